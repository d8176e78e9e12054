"""Feasible plans for several limits, before any program is built: they decide how much of it need not be built."""

from __future__ import annotations

import numpy as np

from mpq_plugins.solvers.blocks import Blocks, Minimum
from mpq_plugins.solvers.deadline import is_over
from mpq_plugins.solvers.lagrangian import Relaxation

_MOST_MOVES = 500


def good_plan(blocks: Blocks, relaxation: Relaxation, deadline: float) -> np.ndarray | None:
    """The best plan that improving the minima near the relaxation finds; None if none of them meets the limits.

    After `deadline`, a value of `time.perf_counter`, no more than the first plan is looked for.
    """
    near = (*relaxation.seen, relaxation.cheap, _dearer(blocks, relaxation))
    met = [minimum.choice for minimum in near if minimum is not None and np.all(minimum.usage <= blocks.limits)]
    distinct = {choice.tobytes(): choice for choice in met}.values()
    plans: list[np.ndarray] = []
    for choice in filter(blocks.problem.is_feasible, distinct):
        plans.append(improved(blocks, choice, deadline))
        if is_over(deadline):
            break
    return min(plans, key=blocks.problem.objective, default=None)


def improved(blocks: Blocks, choice: np.ndarray, deadline: float = np.inf) -> np.ndarray:
    """Change one unit at a time to what saves most loss within the limits, until nothing does."""
    choice = choice.copy()
    for _ in range(_MOST_MOVES):
        slots, positions, gain = _moves(blocks, choice)
        if not len(gain) or gain.max() <= 0 or is_over(deadline):
            break
        at = int(np.argmax(gain))
        choice[blocks.unit[slots[at]]] = blocks.index[slots[at], positions[at]]
    return choice


def reachable_losses(blocks: Blocks, choice: np.ndarray) -> np.ndarray:
    """Losses of the plans that differ from `choice` in one unit and meet the limits, least first."""
    return np.sort(blocks.problem.objective(choice) - _moves(blocks, choice)[2])


def _moves(blocks: Blocks, choice: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Slot, position and saved loss of every feasible change of one unit that keeps its cluster in agreement."""
    problem = blocks.problem
    columns = problem.columns(choice)
    candidates = (blocks.index >= 0) & (blocks.index != choice[blocks.unit][:, None])
    if blocks.is_linked:
        width = problem.width[columns]
        free = np.bincount(blocks.cluster[blocks.option], minlength=blocks.n_clusters)[blocks.cluster[blocks.option]] == 1
        at = problem.start[blocks.unit][:, None] + np.maximum(blocks.index, 0)
        candidates &= free[:, None] | (problem.width[at] == width[blocks.unit][:, None])
    for row, limit in enumerate(problem.limits):
        left = blocks.limits[row] - problem.usage(choice)[row]
        candidates &= blocks.cost[row] - limit.cost[columns][blocks.unit][:, None] <= left
    slots, positions = np.nonzero(candidates)
    return slots, positions, problem.loss[columns][blocks.unit[slots]] - blocks.loss[slots, positions]


def _dearer(blocks: Blocks, relaxation: Relaxation) -> Minimum | None:
    """The minimum at the least multiple of the prices where all limits are met."""
    for exponent in range(-20, 12):
        minimum = blocks.minimum(relaxation.prices * (1.0 + 2.0**exponent))
        if np.all(minimum.usage <= blocks.limits):
            return minimum
    return None
