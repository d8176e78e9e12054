"""Two tiny networks with inputs made in code, for running the path of the bench without any download."""

from __future__ import annotations

import torch
from data import Case, batches
from judge import Classes, Embeddings
from torch import Tensor, nn

from mpq_plugins.training import reestimate_batch_norm


def tiny_cnn(n_calibration: int, n_test: int, seed: int) -> Case:
    """Convolutions with batch normalisation, 10 classes of smooth random images."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )
    reestimate_batch_norm(net, [_images(64, 1)])
    net[-1].weight.data.mul_(8)
    net.eval()
    test = batches(_images(n_test, 2))
    judge = Classes(net, test, _images(20, 3), torch.arange(20) % 10)
    return Case("tiny_cnn", net, batches(_images(n_calibration, 10 + seed)), test, judge, "kl")


def tiny_mixer(n_calibration: int, n_test: int, seed: int) -> Case:
    """Linear layers with layer normalisation over 6 tokens, an embedding as output."""
    torch.manual_seed(0)
    net = _Mixer().eval()
    test = batches(_tokens(n_test, 2))
    calibration = batches(_tokens(n_calibration, 10 + seed))
    return Case("tiny_mixer", net, calibration, test, Embeddings(net, test), "squared_error")


class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.tokens, self.wide, self.narrow = nn.Linear(6, 6), nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, values: Tensor) -> Tensor:
        values = values + self.tokens(self.norm(values).transpose(1, 2)).transpose(1, 2)
        values = values + self.narrow(torch.relu(self.wide(self.norm(values))))
        return self.head(values.mean(dim=1))


def _images(n: int, seed: int) -> Tensor:
    coarse = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=16, mode="bilinear")


def _tokens(n: int, seed: int) -> Tensor:
    return torch.randn(n, 6, 16, generator=torch.Generator().manual_seed(seed))


STANDINS = {"tiny_cnn": tiny_cnn, "tiny_mixer": tiny_mixer}
