"""Iterated local search: a good plan for pairwise losses in little time."""

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
class LocalSearch(AbstractSolver):
    """A feasible plan for pairwise losses, with the bound of one convex relaxation; never a proof.

    A coordinate descent on the priced loss, then the best changes of one unit, one cluster or two units, then `kicks` random
    restarts near the best plan. Equal seeds give equal plans, unless `time_limit_s` of wall time cuts the kicks off.
    """

    name: ClassVar[str] = "local-search"

    kicks: int = 60
    seed: int = 0
    time_limit_s: float = 60.0

    def __post_init__(self) -> None:
        check_time_limit(self.time_limit_s)

    def solve(self, problem: Problem) -> Solution:
        """The best plan met, and plans around it."""
        return search_and_bound(
            problem, self.name, kicks=self.kicks, seed=self.seed, gap=0.0, time_limit_s=self.time_limit_s, branches=False
        )
