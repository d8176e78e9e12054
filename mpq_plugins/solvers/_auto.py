"""The solver to use when none is named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

from mpq_plugins._errors import SolverError
from mpq_plugins._problem import Problem
from mpq_plugins._solution import Solution, Status
from mpq_plugins._solver import AbstractSolver
from mpq_plugins.solvers._knapsack import Knapsack
from mpq_plugins.solvers._milp import MILP


@final
@dataclass(frozen=True)
class Auto(AbstractSolver):
    """`Knapsack` for one limit or none, `MILP` for more, or where the dynamic program stays short of a proof.

    `Solution.solver` says which one answered and why.
    """

    name: ClassVar[str] = "auto"

    time_limit_s: float = 60.0
    gap: float = 1e-9

    def solve(self, problem: Problem) -> Solution:
        """The best plan. Raises `SolverError` for pairwise losses."""
        if problem.pairwise is not None:
            raise SolverError(
                "pairwise losses make this a quadratic program, and no quadratic solver is built in yet. "
                "Use a proxy without pairwise losses, or Exhaustive() on a small space."
            )
        program = MILP(time_limit_s=self.time_limit_s, gap=self.gap)
        if len(problem.limits) > 1:
            return _because(program.solve(problem), f"milp ({len(problem.limits)} limits)")
        quick = Knapsack(gap=self.gap).solve(problem)
        if quick.status is not Status.feasible:
            return _because(quick, "knapsack (one limit)" if problem.limits else "knapsack (no limit)")
        exact = program.solve(problem)
        if exact.choice and exact.objective <= quick.objective:
            return _because(replace(exact, bound=max(exact.bound, quick.bound)), "milp (knapsack left a gap)")
        return _because(replace(quick, bound=max(exact.bound, quick.bound)), "knapsack (milp found nothing better)")


def _because(solution: Solution, reason: str) -> Solution:
    return replace(solution, solver=reason)
