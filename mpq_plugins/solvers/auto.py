"""The solver to use when none is named."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar, final

from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.deadline import check_time_limit
from mpq_plugins.solvers.exhaustive import Exhaustive, count_plans
from mpq_plugins.solvers.knapsack import Knapsack
from mpq_plugins.solvers.milp import MILP
from mpq_plugins.solvers.pairwise import BranchAndBound
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.quadratic import has_pairs, without_pairs
from mpq_plugins.solvers.solution import Solution, Status

_FEW_PLANS = 20_000


@final
@dataclass(frozen=True)
class Auto(AbstractSolver):
    """Picks by the form of the problem; `Solution.solver` says which one answered and why.

    Without pairwise losses: `Knapsack` for one limit or none, `MILP` for more, for units that must agree on activation bits, or
    where the dynamic program stays short of a proof. With them: `Exhaustive` for few plans, else `BranchAndBound`.
    `pair_gap` is the relative gap asked for with pairwise losses.
    """

    name: ClassVar[str] = "auto"

    time_limit_s: float = 60.0
    gap: float = 1e-9
    pair_gap: float = 1e-6

    def __post_init__(self) -> None:
        check_time_limit(self.time_limit_s)

    def solve(self, problem: Problem) -> Solution:
        """The best plan, by the solver that fits."""
        if has_pairs(problem):
            return self._quadratic(problem)
        note = "" if problem.pairwise is None else ", no unit interacts with another"
        return self._linear(without_pairs(problem), note)

    def _linear(self, problem: Problem, note: str) -> Solution:
        started = time.perf_counter()
        program = MILP(time_limit_s=self.time_limit_s, gap=self.gap)
        if len(problem.limits) > 1 or problem.is_linked:
            linked = ", units that agree" if problem.is_linked else ""
            return replace(program.solve(problem), solver=f"milp ({len(problem.limits)} limits{linked}{note})")
        quick = Knapsack(gap=self.gap).solve(problem)
        if quick.status is not Status.feasible:
            return replace(quick, solver=f"knapsack ({'one limit' if problem.limits else 'no limit'}{note})")
        left = max(0.01, self.time_limit_s - (time.perf_counter() - started))
        exact = replace(program, time_limit_s=left).solve(problem)
        if exact.choice and exact.objective <= quick.objective:
            return replace(exact, bound=max(exact.bound, quick.bound), solver=f"milp (knapsack left a gap{note})")
        return replace(quick, bound=max(exact.bound, quick.bound), solver=f"knapsack (milp found nothing better{note})")

    def _quadratic(self, problem: Problem) -> Solution:
        n_plans = count_plans(problem)
        if n_plans <= _FEW_PLANS:
            return replace(Exhaustive().solve(problem), solver=f"exhaustive ({n_plans:,} plans)")
        tree = BranchAndBound(self.time_limit_s, self.pair_gap).solve(problem)
        return replace(tree, solver="branch-and-bound (pairwise losses)")
