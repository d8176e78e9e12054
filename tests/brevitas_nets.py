"""Small seeded networks for the Brevitas tests, and bit configurations for them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpq_plugins import BitConfig, Precision, find_layers


class Cnn(nn.Module):
    """Plain, depthwise and grouped convolutions with batch normalisation, pools, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU6(),
            nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.features(x)).flatten(1))


class Residual(nn.Module):
    """Two blocks: one with an identity shortcut, one with a down-sampling shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.bn_down = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.bn1(self.conv1(x)) + x)
        x = torch.relu(self.bn2(self.conv2(x)) + self.bn_down(self.down(x)))
        return self.fc(x.mean((2, 3)))


class Odd(nn.Module):
    """A module under two names, tied weights, twins of equal value, a transposed convolution, a 3-d linear, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.same = nn.Conv2d(8, 8, 1)
        self.again = self.same
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.head = nn.Linear(4, 5)
        self.twin = nn.Linear(5, 5)
        self.other_twin = nn.Linear(5, 5)
        self.other_twin.load_state_dict(self.twin.state_dict())
        self.mix = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.mix.weight

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.again(self.same(torch.relu(self.stem(x)))))
        tokens = self.head(self.up(x).flatten(2).transpose(1, 2))
        tokens = self.other_twin(torch.relu(self.twin(tokens)))
        return {"tokens": tokens, "pooled": self.tied(torch.relu(self.mix(tokens.mean(1))))}


class Signal(nn.Module):
    """One-dimensional convolutions, plain and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Conv1d(2, 6, 5, padding=2)
        self.widen = nn.ConvTranspose1d(6, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.widen(torch.relu(self.narrow(x)))


class TwoInputs(nn.Module):
    """A perceptron of two named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(4, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.out(torch.relu(self.left(a) + self.right(b)))


class Attention(nn.Module):
    """A transformer block: attention stays float, the linear layers around it are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, stride=8)
        self.norm = nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm(x))).mean(1))


@dataclass(frozen=True)
class Case:
    """A network with its example and its bits; `float_layers` cannot be quantized."""

    build: Callable[[], nn.Module]
    example: Callable[[], Any]
    weights: Sequence[int] = (8, 2, 5, 3, 7, 4, 6)
    activations: Sequence[int] = (6, 3, 8, 2, 5, 4, 7)
    same_activation: Sequence[Sequence[str]] = ()


def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def signals() -> Tensor:
    return torch.randn(4, 2, 32, generator=torch.Generator().manual_seed(5))


def pairs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {"a": torch.randn(4, 6, generator=generator), "b": torch.randn(4, 4, generator=generator)}


CASES = {
    "cnn": Case(Cnn, images),
    "residual": Case(Residual, images, same_activation=(("conv2", "down"),)),
    "binary": Case(Cnn, images, weights=(1, 3, 1, 8)),
    "odd": Case(Odd, images, weights=(3, 8, 2, 5, 4, 6, 7, 7)),
    "signal": Case(Signal, signals, weights=(4, 3)),
    "two-inputs": Case(TwoInputs, pairs),
    "attention": Case(Attention, images),
}
ALL_PROFILES = ("cnn", "residual", "binary", "signal")


def network(name: str) -> nn.Module:
    """The case's network, seeded, in evaluation mode, its batch-normalisation statistics not the initial ones."""
    torch.manual_seed(0)
    model = CASES[name].build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.2, 1.2)  # negative weights too: merging must keep their sign
            nn.init.normal_(module.bias, std=0.2)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def mixed_bits(name: str, model: nn.Module) -> BitConfig:
    """Bits that differ from layer to layer, where they may."""
    case = CASES[name]
    inventory = find_layers(model, case.example())
    pairs = zip(itertools.cycle(case.weights), itertools.cycle(case.activations), strict=False)
    layers = {layer.name: Precision(*pair) for layer, pair in zip(inventory, pairs, strict=False)}
    for first, *others in case.same_activation:
        for other in others:
            layers[other] = Precision(layers[other].weight, layers[first].activation)
    return BitConfig(layers, inventory.fingerprint)
