"""The best plans after the best one."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from mpq_plugins.solvers.blocks import Blocks
from mpq_plugins.solvers.deadline import is_over
from mpq_plugins.solvers.dynamic_program import nearest_plans
from mpq_plugins.solvers.feasible_plans import reachable_losses
from mpq_plugins.solvers.iterated_search import Pool, nearby_plans
from mpq_plugins.solvers.lagrangian import Relaxation, relax
from mpq_plugins.solvers.milp import best_within
from mpq_plugins.solvers.neighbourhood import TrackedPlan
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.quadratic import Quadratic
from mpq_plugins.solvers.solution import Status

MOST_CHOICES = 4_000
_MAX_STATES = 20_000
_TIME_LIMIT_S = 2.0  # for all of them
_PAIRED = 200  # choices that changes are built from


def next_plans(problem: Problem, choice: tuple[int, ...], count: int, *, deadline: float = np.inf) -> list[tuple[int, ...]]:
    """The `count` plans of least loss other than the optimum `choice`; fewer where a proof is out of reach.

    With several limits or linked units, what is not proven within two seconds and by `deadline` is filled up with the best
    plans one or two changes away. Empty for more than `MOST_CHOICES` choices, where thousands of plans are as good as the best.
    """
    if count <= 0 or len(problem.loss) > MOST_CHOICES:
        return []
    blocks = Blocks.of(problem)
    relaxation = relax(blocks)
    reachable = reachable_losses(blocks, np.asarray(choice))
    enough = float(reachable[count - 1]) if len(reachable) >= count else np.inf
    if len(problem.limits) > 1 or problem.is_linked:
        # One after the other, each by a program that the plans before are cut from.
        until = min(deadline, time.perf_counter() + _TIME_LIMIT_S)
        plans = [choice]
        while len(plans) <= count and not is_over(until):
            outcome = best_within(blocks, relaxation, enough, without=tuple(plans), deadline=until, gap=1e-9)
            if outcome.choice is None or outcome.status is not Status.optimal:
                break
            plans.append(tuple(outcome.choice.tolist()))
        return [*plans[1:], *_around(problem, relaxation, plans)][:count]
    # All at once, by the dynamic program. A rounding more than enough: the plan that sets the mark must itself be found.
    reach = (enough - relaxation.value) * (1 + 1e-9) + 1e-9 * abs(enough)
    found = nearest_plans(blocks, relaxation, gap=0.0, max_states=_MAX_STATES, n_plans=count + 1, threshold=reach)
    proven = [tuple(plan.tolist()) for excess, plan in found.plans if excess <= found.cut_off]
    return [plan for plan in proven if plan != choice][:count]


def _around(problem: Problem, relaxation: Relaxation, known: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The best plans one or two changes from the first of the `known` ones and from the best of those; none of the known."""
    choice, n = known[0], len(problem.loss)
    everything = Quadratic.of(replace(problem, pairwise=np.zeros((n, n))))
    now = problem.columns(choice)
    priced = problem.loss + sum(price * row.cost for price, row in zip(relaxation.prices, problem.limits, strict=True))
    near = np.argsort(np.abs(priced - priced[now][problem.unit_of]), kind="stable")[: len(now) + _PAIRED]
    few = everything.restricted(np.isin(everything.columns, np.concatenate([now, near])))
    pool = Pool(few)
    pool.add(TrackedPlan.of(few, few.positions(choice)))
    plans = [few.choice(plan.taken) for plan in nearby_plans(pool)]
    return [plan for plan in plans if plan not in known]
