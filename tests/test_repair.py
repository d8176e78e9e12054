"""BN re-estimation and the reference quantizer."""

import copy

import pytest
import torch
from torch import nn

from mpq_plugins.quantizers.uniform import mse_scale, quantize
from mpq_plugins.training import reestimate_batch_norm


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2)
    ).eval()


def test_statistics_become_the_mean_over_the_batches(net):
    """Running mean and variance equal the average of each batch's own, computed apart."""
    batches = [torch.randn(8, 3, 8, 8) * (index + 1) for index in range(3)]
    outputs = [net[0](batch).detach() for batch in batches]
    assert reestimate_batch_norm(net, batches) == 3
    mean = torch.stack([out.mean((0, 2, 3)) for out in outputs]).mean(0)
    variance = torch.stack([out.var((0, 2, 3)) for out in outputs]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean)
    torch.testing.assert_close(net[1].running_var, variance)


def test_only_the_statistics_change(net):
    """Weights, momentum and modes are as before, and dropout stays off while estimating."""
    before = copy.deepcopy(net)
    reestimate_batch_norm(net, [torch.randn(4, 3, 8, 8)])
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), net.parameters(), strict=True))
    assert net[1].momentum == before[1].momentum
    assert not any(module.training for module in net.modules())


def test_no_batches_and_a_failure_change_nothing(net):
    """With nothing to estimate from, or a batch that fails, the old statistics stay."""
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert reestimate_batch_norm(net, []) == 0
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(net, [torch.randn(4, 3, 8, 8), torch.randn(4, 7, 8, 8)])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net[1].momentum == 0.1


@pytest.mark.parametrize("bits", range(2, 9))
def test_mse_scales_are_as_good_as_a_fine_grid(bits):
    """The error of the chosen scales is within 2 % of the best of 2,000 thresholds, tried one by one in numpy."""
    import numpy as np

    weight = torch.randn(4, 64, 3, 3, generator=torch.Generator().manual_seed(bits))
    scale = mse_scale(weight, bits)
    codes = quantize(weight, scale, bits)
    assert float(codes.max()) <= 2 ** (bits - 1) - 1
    assert float(codes.min()) >= -(2 ** (bits - 1))
    ours = ((codes * scale - weight) ** 2).sum((1, 2, 3)).numpy()
    rows = weight.flatten(1).double().numpy()
    for row, error in zip(rows, ours, strict=True):
        largest = np.abs(row).max() / (2 ** (bits - 1) - 1)
        best = min(
            float(((np.clip(np.round(row / s), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * s - row) ** 2).sum())
            for s in largest * np.linspace(0.0005, 1, 2000)
        )
        assert error <= best * 1.02 + 1e-9


def test_zero_channels_quantize_to_zero():
    """An all-zero channel gets a usable scale and zero codes."""
    weight = torch.zeros(2, 3)
    weight[1] = torch.tensor([1.0, -0.5, 0.25])
    scale = mse_scale(weight, 4)
    assert torch.isfinite(scale).all()
    assert (scale > 0).all()
    assert torch.equal(quantize(weight, scale, 4)[0], torch.zeros(3))
