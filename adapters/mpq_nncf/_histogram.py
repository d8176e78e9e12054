"""Histograms of activations that arrive batch by batch, without knowing their range beforehand."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

_N_BINS = 8192  # a multiple of 4: bins are merged in pairs around zero
_HEADROOM = 1.5  # of the first limit: later batches seldom exceed it, and merging bins costs more than counting
_LEAST_LIMIT = 1e-30  # of a channel that is always 0: bins over a smaller one overflow
_AT_A_TIME = 2**24  # numbers in one step of a search


@final
class Histogram:
    """Counts of values in equal bins from -limit to limit; the limits double as larger values arrive.

    One row for all values, or one per channel of axis 1 when `n_channels` is more than one. `least` and `most` are exact.
    """

    def __init__(self, n_channels: int) -> None:
        self.n_channels = n_channels
        self.n_bins = _N_BINS
        self.counts = torch.zeros(n_channels, self.n_bins)  # [channel, bin]
        self.limit = torch.zeros(n_channels)
        self.least = torch.full((n_channels,), torch.inf)
        self.most = torch.full((n_channels,), -torch.inf)

    @property
    def usable(self) -> bool:
        """Whether values were seen, and all were finite."""
        return bool(self.least.isfinite().all() and self.most.isfinite().all())

    def add(self, values: Tensor) -> None:
        """Count the values of one batch."""
        rows = values.float().reshape(1, -1) if self.n_channels == 1 else values.float().movedim(1, 0).flatten(1)
        self._move(rows.device)
        least, most = torch.aminmax(rows, dim=1)
        self.least, self.most = torch.minimum(self.least, least), torch.maximum(self.most, most)
        if not self.usable:
            return
        self._grow(torch.maximum(self.most, -self.least))
        if self.n_channels == 1:
            limit = float(self.limit)
            self.counts[0] += torch.histc(rows[0], self.n_bins, min=-limit, max=limit)
            return
        scale = self.n_bins / 2 / self.limit[:, None]
        offsets = (torch.arange(self.n_channels, device=rows.device)[:, None] + 0.5) * self.n_bins
        # Rounded towards zero; an integer type of 64 bits is what counting takes, and twice the work for everything before.
        bins = torch.addcmul(offsets, rows, scale.expand_as(rows)).int()
        most_bins = (torch.arange(1, self.n_channels + 1, device=rows.device, dtype=torch.int32) * self.n_bins - 1)[:, None]
        counted = torch.bincount(torch.minimum(bins, most_bins).flatten(), minlength=self.counts.numel())
        self.counts += counted.reshape(self.counts.shape)

    def of_row(self, row: int) -> tuple[Tensor, Tensor]:
        """Centres and counts of the bins that hold values."""
        width = 2 * self.limit[row] / self.n_bins
        centres = (torch.arange(self.n_bins, device=self.counts.device) + 0.5) * width - self.limit[row]
        held = self.counts[row] > 0
        return centres[held], self.counts[row][held]

    def quantile(self, share: float) -> Tensor:
        """The value below which `share` of each row's values lie, to the width of a bin.  # [row]"""
        passed = self.counts.double().cumsum(1)
        index = (passed < share * passed[:, -1:]).sum(1).clamp(max=self.n_bins - 1)
        centres = (index + 0.5) * (2 / self.n_bins) - 1
        return (centres.float() * self.limit).clamp(self.least, self.most)

    def squared_error(self, lows: Tensor, highs: Tensor, n_levels: int) -> Tensor:
        """Squared error of quantizers of `n_levels` codes from `lows` to `highs`, 0 among them, per row.

        # lows, highs and result [row, tried]; the result is relative to each row's limit, squared

        From counts and sums at the boundaries between codes: a value v pays (v - l s)^2 for the lowest code l, and gets back
        2 s (v - c) at each boundary c below it.
        """
        n_rows = max(1, _AT_A_TIME // (lows.shape[1] * n_levels + self.n_bins))
        parts = [
            self._squared_error(slice(start, start + n_rows), lows, highs, n_levels)
            for start in range(0, self.n_channels, n_rows)
        ]
        return torch.cat(parts)

    def _squared_error(self, part: slice, lows: Tensor, highs: Tensor, n_levels: int) -> Tensor:
        limit, counts = self.limit[part, None].double(), self.counts[part].double()
        centres = (torch.arange(self.n_bins, device=counts.device) + 0.5) * (2 / self.n_bins) - 1  # [bin], of limit 1
        n_below = _sums_of_first(counts)
        sums_below = _sums_of_first(counts * centres)
        squares = (counts * centres.square()).sum(1, keepdim=True)
        steps = (highs[part] - lows[part]).double() / limit / (n_levels - 1)  # [row, tried]
        lowest = torch.round(lows[part].double() / limit / steps)
        codes = torch.arange(n_levels - 1, device=counts.device) + 0.5
        boundaries = ((lowest[:, :, None] + codes) * steps[:, :, None]).flatten(1)
        index = torch.ceil((boundaries + 1) * (self.n_bins / 2) - 0.5).long().clamp_(0, self.n_bins)
        above, sums_above = n_below[:, -1:] - n_below.gather(1, index), sums_below[:, -1:] - sums_below.gather(1, index)
        back = (sums_above - boundaries * above).reshape(*steps.shape, -1).sum(2)
        least = lowest * steps
        paid = squares - 2 * least * sums_below[:, -1:] + n_below[:, -1:] * least.square()
        return (paid - 2 * steps * back).clamp(min=0)

    def _move(self, device: torch.device) -> None:
        if self.counts.device != device:
            self.counts, self.limit = self.counts.to(device), self.limit.to(device)
            self.least, self.most = self.least.to(device), self.most.to(device)

    def _grow(self, largest: Tensor) -> None:
        new = self.limit == 0
        self.limit[new] = _HEADROOM * largest[new]
        self.limit[self.limit == 0] = _LEAST_LIMIT
        n_quarter = self.n_bins // 4
        while bool((short := self.limit < largest).any()):
            merged = self.counts[short].reshape(-1, self.n_bins // 2, 2).sum(dim=2)
            self.counts[short] = 0
            self.counts[short, n_quarter : 3 * n_quarter] = merged
            self.limit[short] *= 2


def _sums_of_first(values: Tensor) -> Tensor:
    sums = values.new_zeros(values.shape[0], values.shape[1] + 1)
    torch.cumsum(values, dim=1, out=sums[:, 1:])
    return sums
