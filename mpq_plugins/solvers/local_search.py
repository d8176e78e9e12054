"""Iterated local search: a good plan for pairwise losses in little time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

from mpq_plugins.solvers.answer import answer, infeasible, with_pairs
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.iterated_search import search
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.quadratic import Quadratic
from mpq_plugins.solvers.solution import Solution, Status
from mpq_plugins.solvers.time import check_time_limit
from mpq_plugins.solvers.tree import Tree


@final
@dataclass(frozen=True)
class LocalSearch(AbstractSolver):
    """A feasible plan for pairwise losses, with the bound of one convex relaxation; never a proof.

    A coordinate descent on the priced loss, then the best changes of one unit, one group or two units, then `kicks` random
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
        deadline = time.perf_counter() + self.time_limit_s
        quadratic = Quadratic.of(with_pairs(problem))
        pool, status = search(quadratic, kicks=self.kicks, seed=self.seed, deadline=deadline)
        if status is Status.infeasible:
            return infeasible(self.name)
        tree = Tree(quadratic, pool, 0.0, deadline)
        if tree.may_begin:
            tree.root()
        return answer(pool, self.name, bound=tree.bound, proven=False, prices=tree.prices, nodes=tree.nodes, deadline=deadline)
