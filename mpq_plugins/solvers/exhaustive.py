"""Every plan, one after the other: obviously right, and the judge of the others."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from mpq_plugins.errors import SolverError
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Plan, Solution, Status


@final
@dataclass(frozen=True)
class Exhaustive(AbstractSolver):
    """The reference: tries every plan, pairwise losses included. The first of equal plans in unit order wins.

    `n_next` is how many of the next-best plans it lists.
    """

    name: ClassVar[str] = "exhaustive"

    most_plans: int = 2_000_000
    n_next: int = 64

    def solve(self, problem: Problem) -> Solution:
        """The best plan of all. Raises `SolverError` when there are more than `most_plans`."""
        n_plans = count_plans(problem)
        if n_plans > self.most_plans:
            raise SolverError(
                f"exhaustive search would try {n_plans:.3g} plans, more than most_plans={self.most_plans:.3g}. "
                "Use Auto(), MILP() or Knapsack(), or allow fewer bits."
            )
        columns = [problem.start[u] + digits for u, digits in enumerate(_digits(np.diff(problem.start), n_plans))]
        plans = np.flatnonzero(_feasible(problem, columns, n_plans))
        if not len(plans):
            return Solution(Status.infeasible, (), np.inf, np.inf, solver=self.name, nodes=n_plans)
        loss = _loss(problem, columns, n_plans)[plans]
        best = plans[np.argsort(loss, kind="stable")[: self.n_next + 1]]
        choices = [tuple((np.array([column[plan] for column in columns]) - problem.start[:-1]).tolist()) for plan in best]
        first, *others = [Plan(choice, problem.objective(choice)) for choice in choices]
        found = (first.choice, first.objective, first.objective)
        return Solution(Status.optimal, *found, next_best=tuple(others), solver=self.name, nodes=n_plans)


def count_plans(problem: Problem) -> int:
    """How many ways there are to choose one choice per unit."""
    return math.prod(np.diff(problem.start).tolist())


def _digits(sizes: np.ndarray, n_plans: int) -> list[np.ndarray]:
    """Choice index of every unit in every plan, the last unit changing fastest."""
    strides = np.concatenate([np.cumprod(sizes[::-1])[::-1][1:], [1]]).astype(int)
    return [(np.arange(n_plans) // stride) % size for stride, size in zip(strides, sizes, strict=True)]


def _feasible(problem: Problem, columns: list[np.ndarray], n_plans: int) -> np.ndarray:  # [plan]
    feasible = np.ones(n_plans, dtype=bool)
    for limit in problem.limits:
        usage = sum((limit.cost[column] for column in columns), np.zeros(n_plans))
        feasible &= usage <= limit.limit * (1 + 1e-12)
    first_of_cluster: dict[int, np.ndarray] = {}
    for cluster, column in zip(problem.cluster.tolist(), columns, strict=True):
        feasible &= problem.width[first_of_cluster.setdefault(cluster, column)] == problem.width[column]
    return feasible


def _loss(problem: Problem, columns: list[np.ndarray], n_plans: int) -> np.ndarray:  # [plan]
    loss = sum((problem.loss[column] for column in columns), np.zeros(n_plans))
    if problem.pairwise is not None:
        loss = sum((0.5 * problem.pairwise[pair] for pair in itertools.product(columns, repeat=2)), loss)
    return np.asarray(loss)
