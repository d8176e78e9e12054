"""One limit or none: Lagrangian bound, then a dynamic program over what the bound leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from mpq_plugins.errors import SolverError
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.blocks import Blocks
from mpq_plugins.solvers.dynamic_program import nearest_plans
from mpq_plugins.solvers.lagrangian import relax
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Solution, Status


@final
@dataclass(frozen=True)
class Knapsack(AbstractSolver):
    """Exact for one limit or none and units that need not agree, in numpy alone; proven within `gap` of the optimum.

    `max_states` bounds the memory of the dynamic program; where it is too small the proven gap says so.
    """

    name: ClassVar[str] = "knapsack"

    gap: float = 1e-9
    max_states: int = 100_000

    def solve(self, problem: Problem) -> Solution:
        """The best plan, its bound, and the price of the limit. Raises `SolverError` for anything else."""
        if problem.pairwise is not None:
            raise SolverError("the knapsack solver takes no pairwise losses. Use Auto() or BranchAndBound().")
        if problem.is_linked:
            raise SolverError("the knapsack solver takes no units that must agree on activation bits. Use Auto() or MILP().")
        if len(problem.limits) > 1:
            raise SolverError(
                f"the knapsack solver takes one limit; this problem has {len(problem.limits)}. Use MILP() for several limits."
            )
        blocks = Blocks.of(problem)
        relaxation = relax(blocks)
        if relaxation.is_infeasible:
            return Solution(Status.infeasible, (), np.inf, np.inf, solver=self.name)
        found = nearest_plans(blocks, relaxation, gap=self.gap, max_states=self.max_states)
        excess, choice = found.plans[0]
        closed = excess - found.proven <= self.gap * abs(relaxation.value + excess)
        return Solution(
            Status.optimal if closed else Status.feasible,
            tuple(choice.tolist()),
            problem.objective(choice),
            relaxation.value + found.proven,
            shadow_prices=tuple(relaxation.prices.tolist()),
            solver=self.name,
            nodes=found.n_states,
        )
