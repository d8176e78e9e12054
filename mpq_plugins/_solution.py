"""The answer to an allocation problem, as a certificate."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Status(enum.Enum):
    """How far an answer is proven; its value is the advice that goes with it."""

    optimal = "proven optimal within the gap"
    feasible = "feasible, not proven optimal: the gap bounds what is left; allow more time for a proof"
    infeasible = "no choice meets every limit: relax a budget"
    no_answer = "no feasible choice was found in time: allow more time or relax a budget"


@dataclass(frozen=True)
class Plan:
    """One feasible choice per unit and its loss."""

    choice: tuple[int, ...]  # [unit]
    objective: float


@dataclass(frozen=True)
class Solution:
    """One choice per unit with what is known about it.

    `bound` is a proven lower bound of the loss, `gap` = (objective - bound) / max(|objective|, 1e-12) floored at 0.
    `usage` and `unused` have one number per limit, `shadow_prices` the loss saved per unit more of each limit (at the
    LP relaxation). `next_best` are the best other plans found, best first.
    """

    status: Status
    choice: tuple[int, ...]  # [unit]
    objective: float
    bound: float
    usage: tuple[float, ...] = ()
    unused: tuple[float, ...] = ()
    shadow_prices: tuple[float, ...] = ()
    next_best: tuple[Plan, ...] = ()
    solver: str = ""
    seconds: float = 0.0
    nodes: int = 0

    @property
    def gap(self) -> float:
        """Relative distance from the objective to its proven bound."""
        return max(0.0, (self.objective - self.bound) / max(abs(self.objective), 1e-12))
