"""Losses and limits of ordinary size, whatever the units they come in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mpq_plugins.solvers.problem import Problem

_SPREAD = 1e4
_LIMIT = 2.0**10


@dataclass(frozen=True)
class Scaling:
    """The problem as solvers see it: losses start at zero (unless there are pairs) and spread over 1e4, limits are near 1e3.

    Tiny losses under a solver's absolute tolerances give a wrong "optimal". Factors are powers of two, which round nothing.
    """

    problem: Problem
    factor: float
    shift: float
    rows: tuple[float, ...]  # [limit], what costs and limits are multiplied by

    @classmethod
    def of(cls, problem: Problem) -> Scaling:
        """The scaled problem, with what turns its losses and prices back."""
        least = np.minimum.reduceat(problem.loss, problem.start[:-1])
        spread = float(np.sum(spreads(problem.loss, problem.start[:-1])))
        if problem.pairwise is not None:
            # Pairs may outweigh the linear losses, so that the gap is relative to both together.
            least = np.zeros_like(least)
            spread += float(np.abs(problem.pairwise).max())
        factor = _power_of_two(_SPREAD / spread) if spread > 0 else 1.0
        sizes = [abs(limit.limit) or float(np.abs(limit.cost).max()) for limit in problem.limits]
        rows = tuple(_power_of_two(_LIMIT / size) if size > 0 else 1.0 for size in sizes)
        scaled = replace(
            problem,
            loss=(problem.loss - least[problem.unit_of]) * factor,
            limits=tuple(
                replace(limit, cost=limit.cost * row, limit=limit.limit * row)
                for limit, row in zip(problem.limits, rows, strict=True)
            ),
            pairwise=None if problem.pairwise is None else problem.pairwise * factor,
        )
        return cls(scaled, factor, float(least.sum()), rows)

    def loss(self, scaled: float) -> float:
        """A loss of the problem, from a loss of the scaled problem."""
        return scaled / self.factor + self.shift

    def prices(self, scaled: tuple[float, ...]) -> tuple[float, ...]:
        """Loss per unit of each limit."""
        return tuple(price * row / self.factor for price, row in zip(scaled, self.rows, strict=False))


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value)) if math.isfinite(value) else 2.0**900


def spreads(values: np.ndarray, starts: np.ndarray) -> np.ndarray:  # [unit]
    """Largest less least value of every unit; `starts` are the positions of their first choices."""
    spans: np.ndarray = np.maximum.reduceat(values, starts) - np.minimum.reduceat(values, starts)
    return spans
