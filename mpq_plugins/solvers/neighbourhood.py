"""The plans one or two moves away from a plan of a quadratic problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mpq_plugins.solvers.quadratic import Quadratic

_MOST_PAIRED = 400  # columns that two-moves are built from


@dataclass
class TrackedPlan:
    """One choice of every unit, kept with the loss that every other column would add."""

    quadratic: Quadratic
    taken: np.ndarray  # [unit], position among the open columns
    field: np.ndarray  # [open], loss + pairs @ x
    used: np.ndarray  # [limit]
    loss: float

    @classmethod
    def of(cls, quadratic: Quadratic, taken: np.ndarray) -> TrackedPlan:
        """The plan that takes the columns `taken`."""
        pairs = quadratic.pairs[:, taken].sum(axis=1)
        loss = float(quadratic.loss[taken].sum() + pairs[taken].sum() / 2)
        return cls(quadratic, taken.copy(), quadratic.loss + pairs, quadratic.cost[:, taken].sum(axis=1), loss)

    @property
    def is_feasible(self) -> bool:
        """Whether every limit is met."""
        return bool(np.all(self.used <= self.quadratic.limits))

    def moved(self, new: np.ndarray) -> TrackedPlan:
        """The plan with the columns `new`, one for each of some units, in place of what those units take."""
        quadratic, taken = self.quadratic, self.taken.copy()
        units = quadratic.unit_of[new]
        old = taken[units]
        taken[units] = new
        field = self.field + quadratic.pairs[new].sum(axis=0) - quadratic.pairs[old].sum(axis=0)
        used = self.used + quadratic.cost[:, new].sum(axis=1) - quadratic.cost[:, old].sum(axis=1)
        return TrackedPlan(quadratic, taken, field, used, self.loss + _added(self, old, new))

    def gains(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [open], [limit, open], [open]
        """What taking each column instead of its unit's adds to the loss and to the costs, and whether its width is kept."""
        quadratic = self.quadratic
        now = self.taken[quadratic.unit_of]
        option = quadratic.option_of_slot[quadratic.slot_of]
        return self.field - self.field[now], quadratic.cost - quadratic.cost[:, now], option == option[now]


def best_move(plan: TrackedPlan) -> np.ndarray | None:
    """The column whose taking lowers the loss most within the limits; None when none does."""
    added, cost, same_width = plan.gains()
    left = (plan.quadratic.limits - plan.used)[:, None]
    added = np.where(same_width & np.all(cost <= left, axis=0), added, np.inf)
    at = int(np.argmin(added))
    return np.array([at]) if added[at] < -_rounding(plan) else None


def best_two_moves(plan: TrackedPlan) -> np.ndarray | None:
    """The two columns of different units whose taking lowers the loss most; None when no two do."""
    columns, added, within = two_moves(plan)
    if not len(columns):
        return None
    added = np.where(within, added, np.inf)
    at = np.unravel_index(int(np.argmin(added)), added.shape)
    return columns[list(at)] if added[at] < -_rounding(plan) else None


def two_moves(plan: TrackedPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # [column], [column, column], [column, column]
    """Columns that are cheap to take, what taking two of them adds to the loss, and which two are within the limits."""
    quadratic = plan.quadratic
    added, cost, same_width = plan.gains()
    now = plan.taken[quadratic.unit_of]
    columns = np.flatnonzero(same_width & (now != np.arange(len(now))))
    if len(columns) > _MOST_PAIRED:
        columns = np.sort(columns[np.argpartition(added[columns], _MOST_PAIRED)[:_MOST_PAIRED]])
    old, units = now[columns], quadratic.unit_of[columns]
    pairs = quadratic.pairs
    both = pairs[np.ix_(columns, columns)] + pairs[np.ix_(old, old)]
    crossed = pairs[np.ix_(columns, old)]
    both += added[columns][:, None] + added[columns] - crossed - crossed.T
    within = units[:, None] < units
    for row, left in zip(cost[:, columns], quadratic.limits - plan.used, strict=True):
        within &= row[:, None] + row <= left
    return columns, both, within


def best_cluster_move(plan: TrackedPlan) -> np.ndarray | None:
    """The other width of some cluster that lowers the loss most, every unit at its best choice; None when none does."""
    new, added = min(cluster_moves(plan), key=lambda move: move[1], default=(None, np.inf))
    return new if added < -_rounding(plan) else None


def cluster_moves(plan: TrackedPlan) -> Iterator[tuple[np.ndarray, float]]:
    """Feasible changes of a cluster's width: every unit takes its best choice there, or its cheapest where that is too much."""
    quadratic = plan.quadratic
    if not quadratic.is_linked:
        return
    current = set(quadratic.option_of_slot[quadratic.slot_of[plan.taken]].tolist())
    left = quadratic.limits - plan.used
    cheap = (quadratic.cost / np.maximum(np.abs(quadratic.limits), 1e-300)[:, None]).sum(axis=0)
    for option in np.setdiff1d(np.arange(len(quadratic.option_start)), list(current)).tolist():
        for values in (plan.field, cheap) if len(left) else (plan.field,):
            new = quadratic.best_of([option], values)
            old = plan.taken[quadratic.unit_of[new]]
            if np.all(quadratic.cost[:, new].sum(axis=1) - quadratic.cost[:, old].sum(axis=1) <= left):
                yield new, _added(plan, old, new)
                break


def _added(plan: TrackedPlan, old: np.ndarray, new: np.ndarray) -> float:
    pairs = plan.quadratic.pairs
    squares = pairs[np.ix_(new, new)].sum() + pairs[np.ix_(old, old)].sum() - 2 * pairs[np.ix_(new, old)].sum()
    return float(plan.field[new].sum() - plan.field[old].sum() + squares / 2)


def _rounding(plan: TrackedPlan) -> float:
    return 1e-12 * (abs(plan.loss) + float(np.abs(plan.field[plan.taken]).sum()))
