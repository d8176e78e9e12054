"""The reference quantizer: symmetric, uniform, per channel or per tensor, half to even."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def quantize(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Integer codes of `weight` in [-2^(b-1), 2^(b-1) - 1], as the dtype of `weight`."""
    codes: Tensor = torch.clamp(torch.round(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return codes


def mse_scale(weight: Tensor, bits: int, *, channel_axis: int | None = 0, n_points: int = 80) -> Tensor:
    """Scales that minimise the squared error over a grid of thresholds, shaped to broadcast with `weight`.

    Thresholds run from 1/n_points of the largest magnitude to all of it; step T / (2^(b-1) - 1), as in NNCF. The
    grid is refined once around its best point (80 points alone are too coarse at 2 bits). One scale per slice
    along `channel_axis`, or one for all with None. All-zero slices get scale 1.
    """
    axes = tuple(axis for axis in range(weight.dim()) if axis != channel_axis)
    largest = weight.abs().amax(dim=axes, keepdim=True)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest)) / max(2 ** (bits - 1) - 1, 1)
    best: Tensor = unit.clone()
    error = torch.full_like(unit, torch.inf)

    def try_shares(shares: Iterable[Tensor]) -> None:
        for share in shares:
            scale = unit * share
            found = (quantize(weight, scale, bits) * scale - weight).square().sum(dim=axes, keepdim=True)
            better = found < error
            torch.where(better, scale, best, out=best)
            torch.where(better, found, error, out=error)

    try_shares(torch.linspace(1 / n_points, 1, n_points))
    centre = best / unit
    for offset in torch.linspace(-0.95, 0.95, 20):
        try_shares(((centre + offset / n_points).clamp(1e-3, 1),))
    return best
