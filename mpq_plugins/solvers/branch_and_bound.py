"""Branch and bound on the convex relaxation: pairwise losses with a proof."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.deadline import check_time_limit
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.search_and_bound import search_and_bound
from mpq_plugins.solvers.solution import Solution


@final
@dataclass(frozen=True)
class BranchAndBound(AbstractSolver):
    """Exact for pairwise losses that are convex or nearly so, with any number of limits.

    Starts from the plan of a local search with `kicks` kicks, and closes every choice and node whose convex relaxation lies
    above it. After `time_limit_s` of wall time the best plan so far is returned as feasible, with a bound that is still
    proven. `gap` is relative. The bound holds for indefinite losses too, and is weak there.
    """

    name: ClassVar[str] = "branch-and-bound"

    time_limit_s: float = 60.0
    gap: float = 1e-6
    kicks: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_time_limit(self.time_limit_s)

    def solve(self, problem: Problem) -> Solution:
        """The best plan, its bound, the prices of the limits at the root, and plans around the best one."""
        return search_and_bound(
            problem, self.name, kicks=self.kicks, seed=self.seed, gap=self.gap, time_limit_s=self.time_limit_s, branches=True
        )
