"""Small nets for the NNCF tests, one for each way a weight can be used, and images that can be learnt."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_CLASSES = 4


class Residual(nn.Module):
    """Two residual blocks, the second with a down-sampling shortcut; shortcut and main branch read one tensor."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.a1, self.a2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.na1, self.na2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.b1 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.b2 = nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False)
        self.nb1, self.nb2 = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(2 * width)
        self.downsample = nn.Sequential(nn.Conv2d(width, 2 * width, 1, 2, bias=False), nn.BatchNorm2d(2 * width))
        self.fc = nn.Linear(2 * width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.na2(self.a2(F.relu(self.na1(self.a1(x)))))
        out += x  # `__iadd__`, which a type-based ignored scope would miss
        x = F.relu(out)
        x = F.relu(self.nb2(self.b2(F.relu(self.nb1(self.b1(x))))) + self.downsample(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Zoo(nn.Module):
    """Depthwise, grouped, transposed, functional, tied, shared and concatenated layers, and one left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.norm, self.norm_up, self.norm_joined = nn.BatchNorm2d(8), nn.BatchNorm2d(6), nn.BatchNorm2d(8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1) * 0.3)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.left, self.right = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 6, 3, padding=1)
        self.joined = nn.Conv2d(10, 8, 3, 2, 1)
        self.tied_a, self.tied_b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.tied_b.weight = self.tied_a.weight
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.shared(F.relu(self.shared(x))))
        x = F.relu(F.conv2d(x, self.kernel))
        x = F.relu6(self.depthwise(x))
        x = F.relu(self.norm_up(self.up(F.hardswish(self.grouped(x)))))
        x = F.relu(self.norm_joined(self.joined(torch.cat([self.left(x), self.right(x)], 1))))
        x = F.max_pool2d(x, 4).mean((2, 3))
        return self.head(F.relu(self.tied_b(F.gelu(self.tied_a(x)))))


class Attention(nn.Module):
    """A patch embedding and one transformer block written with linear layers."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 8, 8)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.head = nn.Linear(dim, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


def chain() -> nn.Sequential:
    """A top-level Sequential with one-dimensional convolutions, which NNCF alone leaves partly in float."""
    return nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 8, 9, 8, 1),
        nn.ReLU(),
        nn.ConvTranspose1d(8, 4, 2, 2),
        nn.ReLU(),
        nn.AvgPool1d(16),
        nn.Flatten(),
        nn.Linear(64, 16),
        nn.ReLU(),
        nn.Linear(16, N_CLASSES),
    )


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy templates [n, 3, 32, 32] and their classes."""
    templates = torch.randn(N_CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, N_CLASSES, (n,), generator=generator)
    noise = torch.randn(n, 3, 32, 32, generator=generator)
    return F.interpolate(templates, size=(32, 32), mode="bilinear")[labels] + 0.7 * noise, labels


def train(model: nn.Module, *, steps: int, learning_rate: float = 0.02, seed: int = 0) -> nn.Module:
    """A few steps of SGD, in place; leaves the model in evaluation mode."""
    data, labels = images(256, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), learning_rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(0, len(data), (32,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(data[chosen]), labels[chosen]).backward()
        optimizer.step()
    return model.eval()


def trained(model: nn.Module, *, steps: int = 60) -> nn.Module:
    """The model after a short training from seeded weights."""
    return train(model, steps=steps)
