"""Arithmetic per channel in front of a quantizer: OpenVINO merges both wrongly where the batch is open, unless told not to."""

import pytest
import torch
from mpq_nncf import NNCFAdapter
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify


class Normalised(nn.Module):
    """A network that normalises its images itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.register_buffer("mean", torch.tensor([0.4, -0.5, 0.3]).view(3, 1, 1))
        self.register_buffer("deviation", torch.tensor([0.5, 0.2, 0.8]).view(3, 1, 1))

    def forward(self, x):
        return self.conv((x - self.mean) / self.deviation)


class LayerScale(nn.Module):
    """A linear layer whose output is scaled, channel by channel, for the next."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.linspace(-2, 3, 8))

    def forward(self, x):
        return self.b(self.scale * self.a(x))


class PreActivation(nn.Module):
    """A residual block whose normalisations stand in front of its convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.norm_b, self.norm_c = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.a(x)
        x = x + self.b(torch.relu(self.norm_b(x)))
        return self.c(torch.relu(self.norm_c(x)))


CASES = {
    "image": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)), (8, 3, 10, 10)),
    "image, ReLU": (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3)), (8, 3, 10, 10)),
    "sequence": (lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Conv1d(3, 8, 3)), (8, 3, 20)),
    "volume": (lambda: nn.Sequential(nn.BatchNorm3d(3), nn.Conv3d(3, 8, 2)), (8, 3, 4, 4, 4)),
    "matrix": (lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)), (8, 8)),
    "input normalisation": (Normalised, (8, 3, 10, 10)),
    "LayerScale of a matrix": (LayerScale, (8, 8)),
    "LayerScale of tokens": (LayerScale, (4, 5, 8)),
    "pre-activation": (PreActivation, (8, 3, 10, 10)),
}


def _statistics(model):
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.normal_(norm.running_mean, generator=generator)
            nn.init.uniform_(norm.running_var, 0.1, 4.0, generator=generator)
            nn.init.uniform_(norm.weight, 0.2, 2.0, generator=generator)
            nn.init.normal_(norm.bias, generator=generator)
    return model.eval()


@pytest.mark.parametrize("activation", [5, 8])
@pytest.mark.parametrize("case", CASES)
def test_file_equals_module(case, activation, tmp_path):
    """Executed exactly and by default, at the example's batch and at one image, outputs agree within 1e-5 deviations."""
    torch.manual_seed(0)
    make, shape = CASES[case]
    model, x, adapter = _statistics(make()), torch.randn(shape) * 1.5 + 0.3, NNCFAdapter()
    inventory = find_layers(model, x)
    bits = BitConfig({layer.name: Precision(4, activation) for layer in inventory}, inventory.fingerprint)
    module = adapter.prepare(model, bits, x, [x])
    path = adapter.export(module, tmp_path / "net.xml", x)
    report = verify(adapter, path, bits, module=module, inputs=x, tolerance=1e-5).check()
    assert report.outputs.batch_sizes == (len(x), 1)
    assert report.outputs.deployed < 1e-5
