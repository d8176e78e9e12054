"""Scales of least squared error against hand-worked steps and a search of many thresholds in numpy."""

import numpy as np
import pytest
import torch

from mpq_plugins.errors import DataError
from mpq_plugins.quantizers.squared_error import Codes, Rows, error_of_values
from mpq_plugins.quantizers.uniform import mse_range, mse_scale, mse_scales, quantize

BITS = range(1, 9)


def _weights(n_values):
    generator = torch.Generator().manual_seed(n_values)
    normal, other = torch.randn(2, 6, n_values, generator=generator)
    share = torch.rand(6, n_values, generator=generator)
    return {
        "normal": 0.05 * normal,
        "Laplace": torch.sign(normal) * -torch.log(1 - 0.999 * share),
        "heavy-tailed": normal / other.abs(),
        "one outlier": torch.cat([0.02 * normal[:, :-1], 3 * normal[:, -1:]], dim=1),
        "sparse": normal * (share < 0.1),
        "constant": torch.full((6, n_values), -0.3) * (-1) ** torch.arange(6)[:, None],
        "quantized before": torch.round(normal * 2).clamp(-8, 7) * 0.013,
        "positive": share,
        "tiny": 1e-30 * normal,
        "zero": 0 * normal,
    }


def _errors(row, bits, shares):
    """The squared error of one row at each share of its largest magnitude."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    steps = np.abs(row).max() / max(high, 1) * shares[:, None]
    return ((np.clip(np.round(row / steps), low, high) * steps - row) ** 2).sum(axis=1)


def _grid_then_around(row, bits):
    """80 thresholds and 20 around the best: what every scale must be as good as."""
    grid = np.arange(1, 81) / 80
    best = grid[_errors(row, bits, grid).argmin()]
    around = np.clip(best + np.linspace(-0.95, 0.95, 20) / 80, 1e-3, 1)
    return _errors(row, bits, np.concatenate([grid, around])).min()


@pytest.mark.parametrize("n_values", [9, 64, 600, 2000])
def test_no_worse_than_trying_a_hundred_thresholds(n_values):
    """Whatever the distribution, no channel's error at 1 to 8 bits exceeds that of 100 thresholds tried one by one."""
    for name, weight in _weights(n_values).items():
        scales = mse_scales(weight, BITS)
        for bits, scale in scales.items():
            assert torch.isfinite(scale).all()
            assert (scale > 0).all()
            exact = weight.double()
            ours = (quantize(exact, scale.double(), bits) * scale - exact).square().sum(dim=1).numpy()
            for row, error in zip(exact.numpy(), ours, strict=True):
                if row.any():  # single precision leaves a relative error of 1e-7 in each value
                    assert error <= _grid_then_around(row, bits) * (1 + 1e-6) + 1e-12 * (row**2).sum(), (name, bits)


@pytest.mark.parametrize("codes", [Codes.of(1), Codes.of(2), Codes.of(5), Codes.of(8), Codes.of(3, signed=False)])
def test_counting_and_rounding_agree(codes):
    """The error counted at the code boundaries is the error of rounding each value."""
    rows = Rows(torch.randn(3, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    steps = rows.largest / max(codes.highest, 1) * torch.tensor([0.01, 0.3, 0.8, 1.0, 1.7], dtype=torch.float64)
    counted = rows.error(steps, codes.lowest, codes.n_boundaries + 1)
    torch.testing.assert_close(counted, error_of_values(rows, steps, codes))


def test_best_binary_step_by_hand():
    """With codes -1 and 0, of -3, -2 and -0.1 the first two share the step 2.5 and 5 stays zero."""
    assert mse_scale(torch.tensor([[-0.1, 5.0, -3.0, -2.0]]), 1) == 2.5


def test_exact_steps_are_found():
    """Weights -2, -1, 0 and 1 times 0.25 are their own 2-bit codes: the error is nothing."""
    weight = 0.25 * torch.tensor([[-2.0, -1.0, 0.0, 1.0] * 4])
    assert mse_scale(weight, 2).item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_any_axis_shape_and_dtype(axis):
    """Scales broadcast along the axis asked for, keep the dtype, and are those of the slices one by one."""
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scales = mse_scales(weight.to(dtype), (2, 4), channel_axis=axis)
        for bits, scale in scales.items():
            assert scale.dtype == dtype
            assert not scale.requires_grad
            assert scale.numel() == weight.shape[axis]
            for index in range(weight.shape[axis]):
                alone = mse_scale(weight.to(dtype).select(axis, index), bits, channel_axis=None)
                torch.testing.assert_close(scale.select(axis, index).flatten(), alone.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bits_asked_for_together_are_those_asked_for_alone(dtype):
    """What the search shares among bit-widths is not changed by any of them."""
    weight = torch.randn(2, 500, dtype=dtype, generator=torch.Generator().manual_seed(3))
    for bits, scale in mse_scales(weight, BITS).items():
        torch.testing.assert_close(scale, mse_scale(weight, bits), rtol=0, atol=0)


def test_one_scale_for_a_whole_tensor():
    """Without an axis, 200,000 weights share one scale, as good as any of 400 thresholds."""
    weight = torch.randn(50, 4000, generator=torch.Generator().manual_seed(2))
    row = weight.double().flatten().numpy()
    for bits, scale in mse_scales(weight, (2, 5, 8), channel_axis=None).items():
        assert scale.shape == (1, 1)
        ours = float((quantize(weight, scale, bits).double() * scale.double() - weight).square().sum())
        best = min(_errors(row, bits, np.array([share])).item() for share in np.linspace(0.2, 1, 40))
        assert ours <= best * (1 + 1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_activation_steps_are_as_good_as_a_fine_grid(signed):
    """Steps from a histogram leave an error within 2 % of the best of 50 thresholds over all values."""
    values = torch.randn(4, 32, 64, 64, generator=torch.Generator().manual_seed(3))
    values = values if signed else values.relu()
    for bits, step in mse_range(values, (2, 4, 8), signed=signed).items():
        low, high = Codes.of(bits, signed=signed)

        def error(step, low=low, high=high):
            return float((torch.round(values / step).clamp(low, high) * step - values).square().sum())

        assert step.shape == ()
        assert error(step) <= 1.02 * min(error(values.abs().max() / high * share) for share in torch.linspace(0.02, 1, 50))


@pytest.mark.parametrize("values", [torch.zeros(0, 3), torch.tensor([1.0, torch.nan])])
def test_activations_without_a_range_are_named(values):
    """Empty or non-finite activations are an error that tells their shape."""
    with pytest.raises(DataError, match="empty or hold NaN"):
        mse_range(values, (4,), signed=True)
