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
        limits = []
        for limit in problem.limits:
            size = abs(limit.limit) or float(np.abs(limit.cost).max())
            row = _power_of_two(_LIMIT / size) if size > 0 else 1.0
            limits.append(replace(limit, cost=limit.cost * row, limit=limit.limit * row))
        scaled = replace(
            problem,
            loss=(problem.loss - least[problem.unit_of]) * factor,
            limits=tuple(limits),
            pairwise=None if problem.pairwise is None else problem.pairwise * factor,
        )
        return cls(scaled, factor, float(least.sum()))

    def loss(self, scaled: float) -> float:
        """A loss of the problem, from a loss of the scaled problem."""
        return scaled / self.factor + self.shift

    def prices(self, scaled: tuple[float, ...], problem: Problem) -> tuple[float, ...]:
        """Loss per unit of each limit."""
        if not scaled:
            return ()
        rows = zip(scaled, self.problem.limits, problem.limits, strict=True)
        return tuple(
            price * _ratio(small.limit, limit.limit, small.cost, limit.cost) / self.factor for price, small, limit in rows
        )


def _ratio(small: float, limit: float, small_cost: np.ndarray, cost: np.ndarray) -> float:
    at = int(np.argmax(np.abs(cost)))
    return small / limit if limit else float(small_cost[at] / cost[at]) if cost[at] else 1.0


def _power_of_two(value: float) -> float:
    return 2.0 ** round(math.log2(value)) if math.isfinite(value) else 2.0**900


def spreads(values: np.ndarray, starts: np.ndarray) -> np.ndarray:  # [unit]
    """Largest less least value of every unit; `starts` are the positions of their first choices."""
    spans: np.ndarray = np.maximum.reduceat(values, starts) - np.minimum.reduceat(values, starts)
    return spans
