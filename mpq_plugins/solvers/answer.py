"""The answer of a quadratic solver, from what its search met and proved."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mpq_plugins.solvers import solution
from mpq_plugins.solvers.around import plans_around
from mpq_plugins.solvers.iterated_search import Pool
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Solution, Status


def with_pairs(problem: Problem) -> Problem:
    """The problem with a pairwise table, of zeros where it has none."""
    n = len(problem.loss)
    return problem if problem.pairwise is not None else replace(problem, pairwise=np.zeros((n, n)))


def answer(pool: Pool, name: str, *, bound: float, proven: bool, prices: np.ndarray, nodes: int, deadline: float) -> Solution:
    """The best plan of `pool` and, while there is time, those around it.

    `proven` says that no plan below `bound` is left to find.
    """
    shadow_prices = tuple(prices.tolist())
    best = pool.best
    if best is None:
        status = Status.infeasible if proven else Status.no_answer
        return Solution(status, (), np.inf, np.inf if proven else bound, solver=name, nodes=nodes)
    plans = [solution.Plan(pool.quadratic.choice(plan.taken), plan.loss) for plan in plans_around(pool, deadline)]
    return Solution(
        Status.optimal if proven else Status.feasible,
        plans[0].choice,
        plans[0].objective,
        min(bound, plans[0].objective),
        shadow_prices=shadow_prices,
        next_best=tuple(plans[1:]),
        solver=name,
        nodes=nodes,
    )


def infeasible(name: str) -> Solution:
    """No plan meets every limit."""
    return Solution(Status.infeasible, (), np.inf, np.inf, solver=name)
