"""The reference quantizer: symmetric, uniform, per channel or per tensor, half to even."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq_plugins._squared_error import N_ENDS, Codes, Rows, expected_error, lookups_pay, squared_error

_N_SHARES = 80  # thresholds tried, as shares of the largest magnitude
_OFFSETS = tuple(-0.95 + 0.1 * index for index in range(20))  # thresholds tried around the best, in steps of those shares
_N_FITS = 2
_CACHE_SIZED = {"cpu": 2**16}  # values searched at a time
_AT_A_TIME = 2**24


def quantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of `weight` in [-2^(b-1), 2^(b-1) - 1], as the dtype of `weight`."""
    codes: Tensor = torch.clamp(torch.round(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes


def mse_scale(weight: Tensor, bits: int, *, channel_axis: int | None = 0) -> Tensor:
    """`mse_scales` for one bit-width."""
    return mse_scales(weight, (bits,), channel_axis=channel_axis)[bits]


@torch.no_grad()
def mse_scales(weight: Tensor, bits: Sequence[int], *, channel_axis: int | None = 0) -> dict[int, Tensor]:
    """Scales that minimise the squared error for each bit-width, shaped to broadcast with `weight`.

    One scale per slice along `channel_axis`, or one for all with None. Thresholds T run from 1/80 of the largest
    magnitude to all of it, refined around the best; the step is T / (2^(b-1) - 1), as in NNCF. All-zero slices get
    the scale of largest magnitude 1.
    """
    rows = (weight.detach()[None] if channel_axis is None else weight.detach().movedim(channel_axis, 0)).flatten(1)
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    shape = [1] * weight.dim()
    if channel_axis is not None:
        shape[channel_axis] = -1
    n_rows = max(1, _CACHE_SIZED.get(rows.device.type, _AT_A_TIME) // max(1, rows.shape[1]))
    parts = [Rows(part.contiguous()) for part in rows.split(n_rows)]
    found: dict[int, list[Tensor]] = {width: [] for width in bits}
    for part in parts:
        for width in bits:
            found[width].append(_best_steps(part, Codes.of(width)))
    return {width: torch.cat(steps).to(weight.dtype).reshape(shape) for width, steps in found.items()}


def _best_steps(rows: Rows, codes: Codes) -> Tensor:
    unit = rows.largest / max(codes.highest, 1)
    shares = torch.linspace(1 / _N_SHARES, 1, _N_SHARES, device=unit.device, dtype=unit.dtype)
    best = _best_share(rows, unit * shares, codes)
    offsets = torch.tensor(_OFFSETS, device=unit.device, dtype=unit.dtype) / _N_SHARES
    best, error = _least(rows, torch.cat([best, unit * (best / unit + offsets).clamp(1e-3, 1)], dim=1), codes)
    for _ in range(_N_FITS):
        best, error = _least(rows, torch.cat([best, _fitted(rows, best, codes)], dim=1), codes)
    return best


def _best_share(rows: Rows, steps: Tensor, codes: Codes) -> Tensor:
    if lookups_pay(rows, codes.n_boundaries) or not lookups_pay(rows, N_ENDS):
        return _least(rows, steps, codes)[0]
    expected = expected_error(rows, steps, codes)
    # Rounding errors of n values scatter their sum by 0.9 / sqrt(n).
    margin = 1.05 + 5.4 / rows.n_values**0.5
    n_promising = int((expected <= expected.amin(dim=1, keepdim=True) * margin).sum(dim=1).max())
    promising = expected.topk(n_promising, dim=1, largest=False).indices
    best = _least(rows, steps.gather(1, promising), codes)[0]
    if rows.repetitive.any():  # their rounding errors are not spread evenly
        best[rows.repetitive] = _least(rows[rows.repetitive], steps[rows.repetitive], codes)[0]
    return best


def _least(rows: Rows, steps: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    error = squared_error(rows, steps, codes)
    least, place = error.min(dim=1, keepdim=True)
    return steps.gather(1, place), least


def _fitted(rows: Rows, steps: Tensor, codes: Codes) -> Tensor:
    rounded = torch.round(rows.values / steps).clamp_(codes.lowest, codes.highest)
    across, along = (rounded * rows.values).sum(dim=1, keepdim=True), rounded.square().sum(dim=1, keepdim=True)
    return torch.where(across > 0, across / along.clamp(min=1), steps)
