"""The squared error of uniform quantization at many steps: counted at code boundaries, or value by value."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor

N_ENDS = 4  # boundaries that `expected_error` needs: of the clipped values below and above, and of the values rounded to zero

# What looking up one boundary costs for each halving of the row, in roundings of one value (both measured on a CPU).
_LOOKUP_COST = 8
_REPEATED = 1 / 16  # share of values, from which `Rows.repetitive`


class Codes(NamedTuple):
    """The integers a quantizer can give, both ends included."""

    lowest: int
    highest: int

    @staticmethod
    def of(bits: int, *, signed: bool = True) -> Codes:
        """All codes of so many bits: from -2^(b-1) up when signed, else from zero."""
        return Codes(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else Codes(0, 2**bits - 1)

    @property
    def n_boundaries(self) -> int:
        """How many values lie half-way between two codes."""
        return self.highest - self.lowest


class AbstractSums(abc.ABC):
    """Rows of values as what they add up to below any boundary, from which follows what quantizing them costs."""

    @property
    @abc.abstractmethod
    def totals(self) -> tuple[Tensor | int, Tensor, Tensor]:
        """How many values each row has, their sum, and the sum of their squares.  # [row, 1] each, float64"""

    @abc.abstractmethod
    def below(self, boundaries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the values below boundaries.  # [row, boundary] each"""

    def error(self, steps: Tensor, lowest: Tensor | int, n_levels: int) -> Tensor:
        """The squared error of codes from `lowest` on, in time that grows with boundaries x log(values) x steps.

        # steps and result [row, step], float64; `lowest` may differ among them
        A value v pays (v - l s)^2 for the lowest code l, and gets back 2 s (v - c) at each boundary c below it.
        """
        least = lowest * steps
        halves = torch.arange(n_levels - 1, device=steps.device) + 0.5
        boundaries = (torch.as_tensor(lowest, device=steps.device)[..., None] + halves) * steps[:, :, None]
        n_below, below, _ = self.below(boundaries.flatten(1))
        n_values, total, squares = self.totals
        back = (total - below) - boundaries.flatten(1) * (n_values - n_below)
        paid = squares - 2 * least * total + n_values * least.square()
        return (paid - 2 * steps * back.reshape(*steps.shape, -1).sum(dim=2)).clamp(min=0)

    def expected_error(self, steps: Tensor, lowest: Tensor | int, n_levels: int) -> Tensor:
        """`error` if rounding errors were spread evenly: s^2/12 a value, but exact where clipped or rounded to zero.

        It takes N_ENDS boundaries a step.
        """
        bottom, top = lowest * steps, (lowest + n_levels - 1) * steps
        ends = torch.cat([bottom - steps / 2, -steps / 2, steps / 2, top + steps / 2], dim=1)
        counts, sums, squares = (part.chunk(N_ENDS, dim=1) for part in self.below(ends))
        n_values, total, total_squares = self.totals
        low = squares[0] - 2 * bottom * sums[0] + counts[0] * bottom.square()
        high = total_squares - squares[3] - 2 * top * (total - sums[3]) + (n_values - counts[3]) * top.square()
        n_between = counts[1] - counts[0] + counts[3] - counts[2]
        return (low + high + squares[2] - squares[1] + n_between * steps.square() / 12).clamp_(min=0)


def sums_of_first(values: Tensor) -> Tensor:
    """The sum of the first n values of each row.  # [row, n]"""
    sums = values.new_zeros(values.shape[0], values.shape[1] + 1)
    torch.cumsum(values, dim=1, out=sums[:, 1:])
    return sums


@final
@dataclass(frozen=True)
class Rows(AbstractSums):
    """Rows of values that each get a step of their own; what is shared among bit-widths is computed once."""

    values: Tensor  # [row, value], float32 or float64

    @cached_property
    def largest(self) -> Tensor:
        """The largest magnitude of each row, 1 where all are zero.  # [row, 1]"""
        largest = self.values.abs().amax(dim=1, keepdim=True)
        return torch.where(largest == 0, torch.ones_like(largest), largest)

    @cached_property
    def ascending(self) -> Tensor:
        """The values of each row in order."""
        if self.values.device.type == "cpu":  # numpy's sort is 10 to 20 times faster than torch's, which also keeps indices
            return torch.from_numpy(np.sort(self.values.numpy(), axis=1))
        return self.values.sort(dim=1).values

    @cached_property
    def sums(self) -> Tensor:
        """Sum of the n least values of each row.  # [row, n], float64"""
        return sums_of_first(self.ascending.double())

    @cached_property
    def squares(self) -> Tensor:
        """Sum of the squares of the n least values of each row.  # [row, n], float64"""
        return sums_of_first(self.ascending.to(torch.float64, copy=True).square_())

    @cached_property
    def n_nonzero(self) -> Tensor:
        """How many values of each row are not zero.  # [row, 1]"""
        return torch.count_nonzero(self.values, dim=1)[:, None]

    @cached_property
    def repetitive(self) -> Tensor:
        """Rows where many values occur twice, such as weights that were quantized before.  # [row]"""
        n_repeated = (self.ascending.diff(dim=1) == 0).sum(dim=1)
        n_zeros = self.n_values - self.n_nonzero[:, 0]
        return n_repeated - (n_zeros - 1).clamp(min=0) > _REPEATED * self.n_nonzero[:, 0]

    @property
    def n_values(self) -> int:
        """How many values each row has."""
        return self.values.shape[1]

    def __getitem__(self, chosen: Tensor) -> Rows:
        return Rows(self.values[chosen])

    @property
    def totals(self) -> tuple[int, Tensor, Tensor]:
        """See `AbstractSums.totals`."""
        return self.n_values, self.sums[:, -1:], self.squares[:, -1:]

    def below(self, boundaries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `AbstractSums.below`."""
        n_below = torch.searchsorted(self.ascending, boundaries.to(self.ascending.dtype))
        return n_below, self.sums.gather(1, n_below), self.squares.gather(1, n_below)


def lookups_pay(rows: Rows, n_boundaries: int) -> bool:
    """Whether looking up so many boundaries is cheaper than rounding every value of a row."""
    return n_boundaries * math.log2(rows.n_values + 1) * _LOOKUP_COST < rows.n_values


def squared_error(rows: Rows, steps: Tensor, codes: Codes) -> Tensor:
    """Squared error of each row at each of its steps, the cheaper way.  # steps and result [row, step], result float64"""
    if lookups_pay(rows, codes.n_boundaries):
        return rows.error(steps.double(), codes.lowest, codes.n_boundaries + 1)
    return error_of_values(rows, steps, codes)


def error_of_values(rows: Rows, steps: Tensor, codes: Codes) -> Tensor:
    """`squared_error` by rounding every value: time grows with values x steps, and rows that fit a cache are best."""
    scaled, rounded = torch.empty_like(rows.values), torch.empty_like(rows.values)
    in_steps = torch.empty_like(steps)
    for column, per_step in enumerate((1 / steps).unbind(dim=1)):
        torch.mul(rows.values, per_step[:, None], out=scaled)
        torch.round(scaled, out=rounded)
        scaled.sub_(rounded.clamp_(codes.lowest, codes.highest))
        in_steps[:, column] = torch.linalg.vector_norm(scaled, dim=1)
    return (in_steps.double() * steps).square()
