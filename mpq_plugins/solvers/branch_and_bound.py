"""Branch and bound on the convex relaxation: pairwise losses with a proof."""

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
        started = time.perf_counter()
        deadline = started + self.time_limit_s
        quadratic = Quadratic.of(with_pairs(problem))
        pool, status = search(quadratic, kicks=self.kicks, seed=self.seed, deadline=started + self.time_limit_s / 3)
        if status is Status.infeasible:
            return infeasible(self.name)
        tree = Tree(quadratic, pool, self.gap, deadline)
        tree.run()
        proven, prices = tree.is_closed, tree.prices
        return answer(pool, self.name, bound=tree.bound, proven=proven, prices=prices, nodes=tree.nodes, deadline=deadline)
