"""The reference quantizer: uniform, half to even, per channel or per tensor, with steps of least squared error."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpq_plugins.errors import DataError
from mpq_plugins.quantizers.squared_error import N_ENDS, Codes, Rows, lookups_pay, squared_error

_N_SHARES = 80  # thresholds tried, as shares of the largest magnitude
_OFFSETS = tuple(0.1 * index - 0.95 for index in range(20))  # then tried around the best ones, in distances of those shares
_N_BASINS = 3  # best ones, where a row is so short that its error has many local minima
_CACHE_SIZED, _MEMORY_SIZED = 2**16, 2**24  # values searched at a time on a CPU, and elsewhere
_N_BINS, _N_THRESHOLDS = 2048, 1000  # of the histogram of an activation, and tried on it


def quantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of `weight` in [-2^(b-1), 2^(b-1) - 1], as the dtype of `weight`."""
    codes: Tensor = torch.clamp(torch.round(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes


def mse_scale(weight: Tensor, bits: int, *, channel_axis: int | None = 0) -> Tensor:
    """`mse_scales` for one bit-width."""
    return mse_scales(weight, (bits,), channel_axis=channel_axis)[bits]


@torch.no_grad()
def mse_scales(weight: Tensor, bits: Sequence[int], *, channel_axis: int | None = 0) -> dict[int, Tensor]:
    """Scales of least squared error for each bit-width, shaped to broadcast with `weight`.

    One scale per slice along `channel_axis`, or one for all with None. Thresholds T run from 1/80 of the largest
    magnitude to all of it, refined around the best; the step is T / (2^(b-1) - 1), as in NNCF. An all-zero slice gets
    a scale as if its largest magnitude were 1. Asking for all bit-widths at once sorts the weights once.
    """
    rows = (weight.detach()[None] if channel_axis is None else weight.detach().movedim(channel_axis, 0)).flatten(1)
    shape = [1] * weight.dim()
    if channel_axis is not None:
        shape[channel_axis] = len(rows)
    parts = [{width: _best_step(part, Codes.of(width)) for width in bits} for part in _parts(rows)]
    return {width: torch.cat([part[width] for part in parts]).to(weight.dtype).reshape(shape) for width in bits}


@torch.no_grad()
def mse_range(values: Tensor, bits: Sequence[int], *, signed: bool) -> dict[int, Tensor]:
    """The step of least squared error of an activation tensor for each bit-width, as 0-dimensional tensors.

    Codes are [0, 2^b - 1], or with `signed` [-2^(b-1), 2^(b-1) - 1]; without, negative values become 0. A histogram
    of 2,048 bins and 1,000 thresholds decide, from 1/1000 of the largest magnitude to all of it at equal ratios.
    Raises `DataError` when there are no values, or some are not finite.
    """
    # A sample of 2^18 values is 3 to 4 times faster and misses the tail: up to twice the error at 8 bits.
    largest = float(values.abs().max()) if values.numel() else math.nan
    if not math.isfinite(largest):
        raise DataError(
            f"No range for activations of shape {tuple(values.shape)}: they are empty or hold NaN or infinity. "
            "Check the layer's input on these batches."
        )
    least, largest = (-(largest or 1.0) if signed else 0.0), largest or 1.0
    counts = torch.histc(values.detach().float(), _N_BINS, min=least, max=largest)
    width = (largest - least) / _N_BINS
    centres = torch.arange(_N_BINS, device=counts.device) * width + (least + width / 2)
    thresholds = largest * torch.logspace(-3, 0, _N_THRESHOLDS, device=counts.device)
    return {own: _best_of_bins(centres, counts, thresholds, Codes.of(own, signed=signed)).to(values.dtype) for own in bits}


def _best_of_bins(centres: Tensor, counts: Tensor, thresholds: Tensor, codes: Codes) -> Tensor:
    steps = (thresholds / max(codes.highest, 1))[:, None]
    error = centres - torch.round(centres / steps).clamp_(codes.lowest, codes.highest).mul_(steps)
    return steps[(error.square_() @ counts).argmin(), 0]


def _parts(rows: Tensor) -> tuple[Rows, ...]:
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    n_values = _CACHE_SIZED if rows.device.type == "cpu" else _MEMORY_SIZED
    n_rows = max(1, n_values // max(1, rows.shape[1]))
    return tuple(Rows(rows[start : start + n_rows].contiguous()) for start in range(0, len(rows), n_rows))


def _best_binary_step(rows: Rows) -> Tensor:
    """The exact best step for codes -1 and 0: n values rounded to -s save (sum)^2 / n at s = -sum / n."""
    below = rows.sums[:, 1:].clamp(max=0)
    counts = torch.arange(1, rows.n_values + 1, device=below.device)
    n = (below.square() / counts).argmax(dim=1, keepdim=True)
    step = -below.gather(1, n) / (n + 1)
    return torch.where(step > 0, step, rows.largest.double()).to(rows.values.dtype)


def _best_step(rows: Rows, codes: Codes) -> Tensor:
    if codes == Codes(-1, 0):
        return _best_binary_step(rows)
    unit = rows.largest / max(codes.highest, 1)
    shares = torch.linspace(1 / _N_SHARES, 1, _N_SHARES, device=unit.device, dtype=unit.dtype)
    best = _best_thresholds(rows, unit * shares, codes)
    offsets = torch.tensor(_OFFSETS, device=unit.device, dtype=unit.dtype) / _N_SHARES
    around = (best / unit)[:, :, None] + offsets
    best = _least(rows, torch.cat([best, unit * around.flatten(1).clamp(1e-3, 1)], dim=1), codes)
    return _least(rows, torch.cat([best, _fitted(rows, best, codes)], dim=1), codes)


def _best_thresholds(rows: Rows, steps: Tensor, codes: Codes) -> Tensor:
    if codes.n_boundaries <= 2 * N_ENDS and lookups_pay(rows, codes.n_boundaries):
        return _least(rows, steps, codes)
    if not lookups_pay(rows, N_ENDS):
        return _least(rows, steps, codes, n=_N_BASINS)
    expected = rows.expected_error(steps.double(), codes.lowest, codes.n_boundaries + 1)
    # Rounding errors of n values scatter their mean square by 0.9 / sqrt(n); six times that is allowed for.
    margin = 1.05 + 5.4 / rows.n_nonzero.clamp(min=1).sqrt()
    n_promising = int((expected <= expected.amin(dim=1, keepdim=True) * margin).sum(dim=1).max())
    promising = steps.gather(1, expected.topk(n_promising, dim=1, largest=False).indices)
    best = _least(rows, promising, codes)
    uneven = rows.repetitive
    if n_promising < _N_SHARES and bool(uneven.any()):  # what is expected does not hold for them
        best[uneven] = _least(rows[uneven], steps[uneven], codes)
    return best


def _least(rows: Rows, steps: Tensor, codes: Codes, *, n: int = 1) -> Tensor:
    error = squared_error(rows, steps, codes)
    # The first of equals, where topk leaves open which.
    places = error.argmin(dim=1, keepdim=True) if n == 1 else error.topk(n, dim=1, largest=False).indices
    return steps.gather(1, places)


def _fitted(rows: Rows, steps: Tensor, codes: Codes) -> Tensor:
    """The least-squares steps of the codes that values have now."""
    rounded = torch.round(rows.values / steps).clamp_(codes.lowest, codes.highest)
    products = torch.linalg.vecdot(rounded, rows.values)[:, None]
    fitted = products / torch.linalg.vecdot(rounded, rounded)[:, None]
    return torch.where(products > 0, fitted, steps)
