"""The best plans after the best one."""

from __future__ import annotations

import numpy as np

from mpq_plugins._problem import Problem
from mpq_plugins.solvers._blocks import Blocks
from mpq_plugins.solvers._core import nearest_plans
from mpq_plugins.solvers._dual import relax
from mpq_plugins.solvers._improve import reachable_losses
from mpq_plugins.solvers._milp import best_within
from mpq_plugins.solvers._program import Backend
from mpq_plugins.solvers._secants import Relaxation

MOST_CHOICES = 4_000
_MAX_STATES = 20_000
_TIME_LIMIT_S = 10.0


def next_plans(problem: Problem, choice: tuple[int, ...], count: int, *, backend: Backend = "auto") -> list[tuple[int, ...]]:
    """The `count` plans of least loss other than the optimum `choice`, best first; fewer where a proof is out of reach.

    Empty for more than `MOST_CHOICES` choices, where thousands of plans are as good as the best.
    """
    if count <= 0 or len(problem.loss) > MOST_CHOICES:
        return []
    blocks = Blocks.of(problem)
    relaxation = relax(blocks, backend=backend)
    reachable = reachable_losses(blocks, np.asarray(choice))
    enough = float(reachable[count - 1]) if len(reachable) >= count else np.inf
    if len(problem.limits) > 1:
        return _by_cuts(blocks, relaxation, choice, count, enough, backend)
    return _by_program(blocks, relaxation, choice, count, enough)


def _by_program(
    blocks: Blocks, relaxation: Relaxation, choice: tuple[int, ...], count: int, enough: float
) -> list[tuple[int, ...]]:
    """All at once, by the dynamic program."""
    # A rounding more than enough: the plan that sets the mark must itself be found.
    reach = (enough - relaxation.value) * (1 + 1e-9) + 1e-9 * abs(enough)
    found = nearest_plans(blocks, relaxation, gap=0.0, max_states=_MAX_STATES, n_plans=count + 1, threshold=reach)
    proven = [tuple(plan.tolist()) for excess, plan in found.plans if excess <= found.cut_off]
    return [plan for plan in proven if plan != choice][:count]


def _by_cuts(
    blocks: Blocks, relaxation: Relaxation, choice: tuple[int, ...], count: int, enough: float, backend: Backend
) -> list[tuple[int, ...]]:
    """One after the other, each by a program that the plans before are cut from."""
    from mpq_plugins._solution import Status

    plans = [choice]
    while len(plans) <= count:
        outcome = best_within(
            blocks, relaxation, enough, without=tuple(plans), backend=backend, time_limit_s=_TIME_LIMIT_S, gap=1e-9
        )
        if outcome.choice is None or outcome.status is not Status.optimal:
            break
        plans.append(tuple(int(index) for index in outcome.choice))
    return plans[1:]
