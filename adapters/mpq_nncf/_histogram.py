"""Histograms of activations that arrive batch by batch, without knowing their range beforehand."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

_N_BINS = 8192  # a multiple of 4: bins are merged in pairs around zero


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
        self.least = torch.minimum(self.least, rows.amin(dim=1))
        self.most = torch.maximum(self.most, rows.amax(dim=1))
        if not self.usable:
            return
        self._grow(torch.maximum(self.most, -self.least))
        scale = self.n_bins / 2 / self.limit[:, None]
        bins = ((rows + self.limit[:, None]) * scale).long().clamp_(0, self.n_bins - 1)
        bins += torch.arange(self.n_channels, device=rows.device)[:, None] * self.n_bins
        counted = torch.bincount(bins.flatten(), minlength=self.counts.numel())
        self.counts += counted.reshape(self.counts.shape)

    def of_row(self, row: int) -> tuple[Tensor, Tensor]:
        """Centres and counts of the bins that hold values."""
        width = 2 * self.limit[row] / self.n_bins
        centres = (torch.arange(self.n_bins, device=self.counts.device) + 0.5) * width - self.limit[row]
        held = self.counts[row] > 0
        return centres[held], self.counts[row][held]

    def quantile(self, row: int, share: float) -> Tensor:
        """The value below which `share` of the row's values lie, to the width of a bin."""
        centres, counts = self.of_row(row)
        passed = counts.double().cumsum(0) / counts.double().sum()
        index = int((passed < share).sum())
        return centres[min(index, len(centres) - 1)].clamp(self.least[row], self.most[row])

    def _move(self, device: torch.device) -> None:
        if self.counts.device != device:
            self.counts, self.limit = self.counts.to(device), self.limit.to(device)
            self.least, self.most = self.least.to(device), self.most.to(device)

    def _grow(self, largest: Tensor) -> None:
        new = self.limit == 0
        self.limit[new] = largest[new]
        self.limit[self.limit == 0] = torch.finfo(torch.float32).tiny
        n_quarter = self.n_bins // 4
        while bool((short := self.limit < largest).any()):
            merged = self.counts[short].reshape(-1, self.n_bins // 2, 2).sum(dim=2)
            self.counts[short] = 0
            self.counts[short, n_quarter : 3 * n_quarter] = merged
            self.limit[short] *= 2
