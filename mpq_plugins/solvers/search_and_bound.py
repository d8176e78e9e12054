"""What both solvers of pairwise losses do: search for plans, bound them, and report the best with those near it."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from mpq_plugins.solvers.iterated_search import search
from mpq_plugins.solvers.nearby import nearby_plans
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.quadratic import Quadratic
from mpq_plugins.solvers.solution import Plan, Solution, Status
from mpq_plugins.solvers.tree import Tree


def search_and_bound(
    problem: Problem, name: str, *, kicks: int, seed: int, gap: float, time_limit_s: float, branches: bool
) -> Solution:
    """The best plan of a local search, with the bound of one relaxation or, where it `branches`, of the whole tree."""
    started = time.perf_counter()
    deadline = started + time_limit_s
    n = len(problem.loss)
    quadratic = Quadratic.of(problem if problem.pairwise is not None else replace(problem, pairwise=np.zeros((n, n))))
    until = started + time_limit_s / 3 if branches else deadline
    pool, status = search(quadratic, kicks=kicks, seed=seed, deadline=until)
    if status is Status.infeasible:
        return Solution(status, (), np.inf, np.inf, solver=name)
    tree = Tree(quadratic, pool, gap, deadline)
    if branches:
        tree.run()
    elif tree.may_begin:
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
