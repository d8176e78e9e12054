"""The solvers of pairwise losses: search for plans, bound them, and report the best with those near it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import ClassVar, final

import numpy as np

from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.deadline import check_time_limit
from mpq_plugins.solvers.iterated_search import nearby_plans, search
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.quadratic import Quadratic
from mpq_plugins.solvers.solution import Plan, Solution, Status
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
        return _search_and_bound(self, problem, self.gap, branches=True)


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
        return _search_and_bound(self, problem, 0.0, branches=False)


def _search_and_bound(solver: BranchAndBound | LocalSearch, problem: Problem, gap: float, *, branches: bool) -> Solution:
    """The best plan of a local search, with the bound of one relaxation or, where it `branches`, of the whole tree."""
    started, name = time.perf_counter(), solver.name
    deadline = started + solver.time_limit_s
    n = len(problem.loss)
    quadratic = Quadratic.of(problem if problem.pairwise is not None else replace(problem, pairwise=np.zeros((n, n))))
    until = started + solver.time_limit_s / 3 if branches else deadline
    pool, status = search(quadratic, kicks=solver.kicks, seed=solver.seed, deadline=until)
    if status is Status.infeasible:
        return Solution(status, (), np.inf, np.inf, solver=name)
    tree = Tree(quadratic, pool, gap, deadline)
    if branches:
        tree.run()
    elif tree.has_time(quadratic):
        tree.root()
    proven = branches and tree.is_closed
    if pool.best is None:
        status = Status.infeasible if proven else Status.no_answer
        return Solution(status, (), np.inf, np.inf if proven else tree.bound, solver=name, nodes=tree.nodes)
    plans = [Plan(quadratic.choice(plan.taken), plan.loss) for plan in nearby_plans(pool, deadline)]
    return Solution(
        Status.optimal if proven else Status.feasible,
        plans[0].choice,
        plans[0].objective,
        min(tree.bound, plans[0].objective),
        shadow_prices=tuple(tree.prices.tolist()),
        next_best=tuple(plans[1:]),
        solver=name,
        nodes=tree.nodes,
    )
