"""Histograms of activations that arrive batch by batch, without knowing their range beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mpq_plugins.quantizers.squared_error import AbstractSums, sums_of_first

_N_BINS = 8192  # a multiple of 4: bins are merged in pairs around zero
_N_BINS_PER_CHANNEL = 2048  # thousands of channels must stay near the processor
_N_SAMPLED, _N_SAMPLED_PER_CHANNEL = 2**21, 2**18  # values of a row that are counted in all batches
_LEAST_SAMPLED = 2**12  # in one batch
_HEADROOM = 1.5  # of the first limit: later batches seldom exceed it, and merging bins costs more than counting
_LEAST_LIMIT = 1e-30  # of rows of zeros
_MANY_LEVELS = 64
_N_TRIED, _N_REFINED = 48, 17  # thresholds
_AT_A_TIME = 2**24  # numbers in one step of a search


@final
class Histogram:
    """Counts of values in equal bins from -limit to limit; the limits double as larger values arrive.

    One row for all values, or one per channel of axis 1 when `n_channels` is more than one. `least` and `most` are exact.
    `n_batches` is how many calls of `add` to expect: of very many values only every so many is counted.
    """

    def __init__(self, n_channels: int, n_batches: int = 1) -> None:
        in_all = _N_SAMPLED if n_channels == 1 else _N_SAMPLED_PER_CHANNEL
        self._n_sampled = max(_LEAST_SAMPLED, in_all // max(1, n_batches))
        self.n_channels = n_channels
        self.n_bins = _N_BINS if n_channels == 1 else _N_BINS_PER_CHANNEL
        self.counts = torch.zeros(n_channels, self.n_bins)  # [channel, bin]
        self.limit = torch.zeros(n_channels)
        self.least = torch.full((n_channels,), torch.inf)
        self.most = torch.full((n_channels,), -torch.inf)

    @property
    def usable(self) -> bool:
        """Whether values were seen, and all were finite."""
        return bool(self.least.isfinite().all() and self.most.isfinite().all())

    @property
    def empty(self) -> bool:
        """Whether no value was seen."""
        return bool((self.least > self.most).all())

    def add(self, values: Tensor) -> None:
        """Count the values of one batch; of very many only every so many, the extremes being exact all the same."""
        if not values.numel():
            return
        values = values.detach().float()
        self._move(values.device)
        if self.n_channels == 1:
            values = _in_memory_order(values)
            least, most = (extreme.reshape(1) for extreme in torch.aminmax(values))
        else:
            others = [axis for axis in range(values.dim()) if axis != 1]
            least, most = values.amin(others), values.amax(others)
        self.least, self.most = torch.minimum(self.least, least), torch.maximum(self.most, most)
        if not self.usable:
            return
        self._grow(torch.maximum(self.most, -self.least))
        rows = _sampled(values, self._n_sampled)[None] if self.n_channels == 1 else _sampled_channels(values, self._n_sampled)
        scale = self.n_bins / 2 / self.limit[:, None]
        # Counting takes integers of 64 bits; those of 32 are enough, and half the work, up to there. `histc` is 8 times slower.
        bins = rows.mul(scale).add_(self.n_bins / 2).int().clamp_(0, self.n_bins - 1)
        if self.n_channels > 1:
            bins.add_(torch.arange(self.n_channels, device=rows.device, dtype=torch.int32)[:, None] * self.n_bins)
        counted = torch.bincount(bins.flatten(), minlength=self.counts.numel())
        self.counts += counted.reshape(self.counts.shape)

    def quantile(self, share: float) -> Tensor:
        """The value below which `share` of each row's values lie, to the width of a bin.  # [row]"""
        passed = self.counts.double().cumsum(1)
        index = (passed < share * passed[:, -1:]).sum(1).clamp(max=self.n_bins - 1)
        centres = (index + 0.5) * (2 / self.n_bins) - 1
        return (centres.float() * self.limit).clamp(self.least, self.most)

    def squared_error(self, lows: Tensor, highs: Tensor, n_levels: int) -> Tensor:
        """Squared error of quantizers of `n_levels` codes from `lows` to `highs`, 0 among them, per row.

        # lows, highs and result [row, tried]; the result is relative to each row's limit, squared

        From counts and sums at the boundaries between codes. With more than 64 of them rounding errors are spread evenly:
        s^2/12 a value, but exact where it is clipped or becomes 0.
        """
        n_rows = max(1, _AT_A_TIME // (lows.shape[1] * min(n_levels, _MANY_LEVELS) + self.n_bins))
        parts = [
            self._squared_error(slice(start, start + n_rows), lows, highs, n_levels)
            for start in range(0, self.n_channels, n_rows)
        ]
        return torch.cat(parts)

    def _squared_error(self, part: slice, lows: Tensor, highs: Tensor, n_levels: int) -> Tensor:
        limit, counts = self.limit[part, None].double(), self.counts[part].double()
        centres = (torch.arange(self.n_bins, device=counts.device) + 0.5) * (2 / self.n_bins) - 1  # [bin], of limit 1
        steps = (highs[part] - lows[part]).double() / limit / (n_levels - 1)  # [row, tried]
        lowest = torch.round(lows[part].double() / limit / steps)
        of_values = sums_of_first(counts), sums_of_first(counts * centres), sums_of_first(counts * centres.square())
        bins = _Bins(self.n_bins, of_values)
        return (bins.expected_error if n_levels > _MANY_LEVELS else bins.error)(steps, lowest, n_levels)

    def _move(self, device: torch.device) -> None:
        if self.counts.device != device:
            self.counts, self.limit = self.counts.to(device), self.limit.to(device)
            self.least, self.most = self.least.to(device), self.most.to(device)

    def _grow(self, largest: Tensor) -> None:
        new = self.limit <= _LEAST_LIMIT  # zeros stay in their bin whatever the limit is
        self.limit[new] = (_HEADROOM * largest[new]).clamp(min=_LEAST_LIMIT)
        n_quarter = self.n_bins // 4
        while bool((short := self.limit < largest).any()):
            merged = self.counts[short].reshape(-1, self.n_bins // 2, 2).sum(dim=2)
            self.counts[short] = 0
            self.counts[short, n_quarter : 3 * n_quarter] = merged
            self.limit[short] *= 2


def best_threshold(largest: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """The threshold up to `largest` with the least error: tried at equal ratios, then between the neighbours of the best.

    # largest and result [row]; `error` takes and gives [row, tried]
    """
    tried = largest[:, None] * torch.logspace(-2, 0, _N_TRIED, device=largest.device)
    place = error(tried).argmin(dim=1, keepdim=True)
    below, above = (tried.gather(1, (place + by).clamp(0, _N_TRIED - 1)) for by in (-1, 1))
    around = torch.lerp(below, above, torch.linspace(0, 1, _N_REFINED, device=largest.device))
    return around.gather(1, error(around).argmin(dim=1, keepdim=True))[:, 0]


def _in_memory_order(values: Tensor) -> Tensor:
    """All values in one row, as they lie in memory: a view where they lie densely, also of images with channels last."""
    strides = values.stride()
    return values.permute(sorted(range(values.dim()), key=lambda axis: -strides[axis])).reshape(-1)


def least_error_threshold(histogram: Histogram, most: Tensor, codes: tuple[int, int], n_steps: int) -> Tensor:
    """The threshold of least squared error for each row, `n_steps` steps long, up to `most`.  # most and result [row]

    The quantizer has the lowest and highest of `codes` and no zero point.
    """
    lowest, highest = codes

    def error(thresholds: Tensor) -> Tensor:
        least, largest = thresholds * (lowest / n_steps), thresholds * (highest / n_steps)
        return histogram.squared_error(least, largest, highest - lowest + 1)

    return best_threshold(most, error)


def _sampled(values: Tensor, most: int) -> Tensor:
    """Every so many of a row of values; no channel and no column of images is left out, as the stride divides nothing."""
    stride = max(1, len(values) // most)
    while math.gcd(stride, len(values)) > 1:
        stride += 1
    return values[::stride]


def _sampled_channels(values: Tensor, most: int) -> Tensor:
    """Sampled values of each channel of axis 1.  # [channel, value]"""
    n_channels = values.shape[1]
    stride = max(1, values.numel() // n_channels // most)
    stride += stride > 1 and 1 - stride % 2  # odd, as images have even widths
    if values.is_contiguous():
        return values.reshape(len(values), n_channels, -1)[:, :, ::stride].movedim(1, 0).flatten(1)
    return values.movedim(1, -1).reshape(-1, n_channels)[::stride].t()


@dataclass(frozen=True)
class _Bins(AbstractSums):
    """Counts, sums and sums of squares of the first bins of rows of limit 1.  # [row, bin + 1] each"""

    n_bins: int
    of_first: tuple[Tensor, Tensor, Tensor]

    @property
    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        counts, sums, squares = self.of_first
        return counts[:, -1:], sums[:, -1:], squares[:, -1:]

    def below(self, boundaries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.ceil((boundaries + 1) * (self.n_bins / 2) - 0.5).long().clamp_(0, self.n_bins)
        counts, sums, squares = self.of_first
        return counts.gather(1, index), sums.gather(1, index), squares.gather(1, index)
