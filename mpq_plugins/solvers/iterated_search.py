"""Iterated local search for quadratic problems: descend, kick, descend again; and the best plans around the best one."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from mpq_plugins.solvers.deadline import is_over
from mpq_plugins.solvers.milp import MILP
from mpq_plugins.solvers.neighbourhood import (
    TrackedPlan,
    best_cluster_move,
    best_move,
    best_two_moves,
    cluster_moves,
    two_moves,
)
from mpq_plugins.solvers.quadratic import Quadratic, without_pairs
from mpq_plugins.solvers.solution import Status

_MOST_MOVES = 10_000
_SWEEPS = 30
_HALVINGS = 24
_MOST_KEPT = 256
_LISTED = 64  # plans listed
_CENTRES = 4  # best plans whose neighbours are listed


@dataclass
class Pool:
    """The best distinct plans met, by the positions of their columns."""

    quadratic: Quadratic
    loss_of: dict[bytes, float] = field(default_factory=dict)

    def add(self, plan: TrackedPlan) -> None:
        """Remember a feasible plan."""
        plan = TrackedPlan.of(self.quadratic, plan.taken)  # sums that many moves have rounded are taken anew
        if plan.is_feasible:
            self.loss_of[plan.taken.astype(np.int64).tobytes()] = plan.loss
            if len(self.loss_of) > 2 * _MOST_KEPT:
                best = sorted(self.loss_of.items(), key=lambda item: item[1])[:_MOST_KEPT]
                self.loss_of = dict(best)

    @property
    def best_loss(self) -> float:
        """The least loss, inf while there is no plan."""
        return min(self.loss_of.values(), default=np.inf)

    @property
    def best(self) -> TrackedPlan | None:
        """The plan of least loss, None while there is none."""
        if not self.loss_of:
            return None
        return self._plan(min(self.loss_of, key=lambda key: self.loss_of[key]))

    def plans(self) -> list[TrackedPlan]:
        """All of them, best first."""
        return [self._plan(key) for key in sorted(self.loss_of, key=lambda key: self.loss_of[key])][:_MOST_KEPT]

    def moved_to(self, restricted: Quadratic, taken: np.ndarray) -> TrackedPlan:
        """The plan with the columns `taken` of a restriction of the quadratic problem, in any order."""
        return TrackedPlan.of(self.quadratic, self.quadratic.positions(restricted.choice(taken)))

    def _plan(self, key: bytes) -> TrackedPlan:
        return TrackedPlan.of(self.quadratic, np.frombuffer(key, dtype=np.int64))


def search(quadratic: Quadratic, *, kicks: int, seed: int, deadline: float) -> tuple[Pool, Status]:
    """The best plans that starts, descents and kicks meet; the status is infeasible when it is proven that there is none.

    Ends soon after `deadline`, a value of `time.perf_counter`.
    """
    pool = Pool(quadratic)
    starts, status = _starts(quadratic, deadline)
    for start in starts:
        pool.add(descend(start, deadline))
    best = pool.best
    if best is None:
        return pool, status
    rng = np.random.default_rng(seed)
    for _ in range(kicks):
        if is_over(deadline):
            break
        kicked = repair(_kicked(best, rng))
        if kicked is not None:
            plan = descend(kicked, deadline)
            pool.add(plan)
            best = min(best, plan, key=lambda plan: plan.loss)
    return pool, Status.feasible


def descend(plan: TrackedPlan, deadline: float = np.inf) -> TrackedPlan:
    """Take the best single, cluster or double move until none lowers the loss, or until `deadline`."""
    for _ in range(_MOST_MOVES):
        if is_over(deadline):
            break
        moves = (find(plan) for find in (best_move, best_cluster_move, best_two_moves))
        new = next((move for move in moves if move is not None), None)
        if new is None:
            break
        plan = plan.moved(new)
    return plan


def repair(plan: TrackedPlan) -> TrackedPlan | None:
    """Lower the excess over the limits, each time where that adds least loss per excess; None where that ends above them."""
    quadratic = plan.quadratic
    scale = 1 / np.maximum(np.abs(quadratic.limits), 1e-300)
    for _ in range(len(quadratic.columns)):
        if plan.is_feasible:
            return plan
        added, cost, same_width = plan.gains()
        over = np.maximum(plan.used - quadratic.limits, 0.0) * scale
        after = np.maximum((plan.used - quadratic.limits)[:, None] + cost, 0.0) * scale[:, None]
        less = over.sum() - after.sum(axis=0)
        useful = same_width & (less > 0)
        if not useful.any():
            return None
        rate = np.where(useful, added / np.where(useful, less, 1.0), np.inf)
        plan = plan.moved(np.array([int(np.argmin(rate))]))
    return None


def _starts(quadratic: Quadratic, deadline: float) -> tuple[list[TrackedPlan], Status]:
    """The best plan without the pairs, and that of a coordinate descent on the priced loss."""
    left = deadline - time.perf_counter()
    linear = MILP(time_limit_s=max(0.1, left / 4), gap=1e-3).solve(without_pairs(quadratic.problem))
    if linear.status is Status.infeasible:
        return [], Status.infeasible
    starts = [] if linear.choice and is_over(deadline) else _priced_descents(quadratic, deadline)
    if linear.choice:
        starts.append(TrackedPlan.of(quadratic, quadratic.positions(linear.choice)))
    return starts, Status.no_answer


def _priced_descents(quadratic: Quadratic, deadline: float) -> list[TrackedPlan]:
    """Plans of least loss plus price times cost, at the least prices, found by halving, where the limits are met."""
    span = np.ptp(quadratic.cost, axis=1)
    price = np.where(span > 0, np.ptp(quadratic.loss) / np.where(span > 0, span, 1.0), 0.0)
    alone = quadratic.best_of(quadratic.cluster_start, quadratic.loss)
    plan = TrackedPlan.of(quadratic, quadratic.positions(quadratic.choice(alone)))
    low, high = 0.0, None
    found: list[TrackedPlan] = []
    factor = 0.0
    for _ in range(_HALVINGS):
        if found and is_over(deadline):
            break
        plan = _coordinate_descent(plan, factor * price @ quadratic.cost)
        if plan.is_feasible:
            found.append(plan)
            high = factor
            if factor == 0.0:
                break
        else:
            low = factor
        factor = (low + high) / 2 if high is not None else max(1.0, 4 * factor)
        if factor > 1e9:
            break
    repaired = repair(plan)
    return sorted([*found, *([repaired] if repaired else [])], key=lambda plan: plan.loss)[:2]


def _coordinate_descent(plan: TrackedPlan, price: np.ndarray) -> TrackedPlan:
    """Every cluster in turn takes its best width and choices, given the others, until none changes."""
    quadratic, taken, values = plan.quadratic, plan.taken.copy(), plan.field + price
    bounds = np.append(quadratic.slot_start, len(quadratic.columns)).tolist()
    options = [part.tolist() for part in np.split(np.arange(len(quadratic.slot_start)), quadratic.option_start[1:])]
    clusters = [part.tolist() for part in np.split(np.arange(len(options)), quadratic.cluster_start[1:])]
    units = quadratic.unit_of
    for _ in range(_SWEEPS):
        changed = False
        for cluster in clusters:
            tried = []
            for option in cluster:
                new = [bounds[slot] + int(values[bounds[slot] : bounds[slot + 1]].argmin()) for slot in options[option]]
                tried.append((float(sum(values[at] for at in new)), new))
            for at in min(tried)[1]:
                old = taken[units[at]]
                if at != old:
                    values += quadratic.pairs[at] - quadratic.pairs[old]
                    taken[units[at]] = at
                    changed = True
        if not changed:
            break
    return TrackedPlan.of(quadratic, taken)


def _kicked(plan: TrackedPlan, rng: np.random.Generator) -> TrackedPlan:
    """The plan with a few clusters at random widths and choices."""
    quadratic = plan.quadratic
    n_clusters = len(quadratic.cluster_start)
    most = max(4, n_clusters // 5)
    ends = np.append(quadratic.cluster_start, len(quadratic.option_start))
    new = []
    for cluster in rng.choice(n_clusters, min(n_clusters, int(rng.integers(3, most + 1))), replace=False).tolist():
        new.append(quadratic.best_of([int(rng.integers(*ends[cluster : cluster + 2]))], rng.random(len(quadratic.columns))))
    return plan.moved(np.concatenate(new))


def nearby_plans(pool: Pool, deadline: float = np.inf) -> list[TrackedPlan]:
    """The best of the plans that the search met and of those one or two moves from the best of them; best first.

    After `deadline` only the best one, which there must be.
    """
    if is_over(deadline) and pool.best is not None:
        return [pool.best]
    wide = Pool(pool.quadratic)
    met = pool.plans()
    for plan in met:
        wide.add(plan)
    for centre in met[:_CENTRES]:
        for new in [] if is_over(deadline) else _neighbours(centre):
            if is_over(deadline):
                break
            wide.add(centre.moved(new))
    return wide.plans()[:_LISTED]


def _neighbours(plan: TrackedPlan) -> list[np.ndarray]:
    """Columns to take for the best feasible changes: the best single and double moves, and other widths of a cluster."""
    added, cost, same_width = plan.gains()
    within = same_width & np.all(cost <= (plan.quadratic.limits - plan.used)[:, None], axis=0)
    within[plan.taken] = False
    singles = np.flatnonzero(within)[np.argsort(added[within], kind="stable")[:_LISTED]]
    columns, both, allowed = two_moves(plan)
    first, second = np.nonzero(allowed)
    order = np.argsort(both[first, second], kind="stable")[:_LISTED]
    doubles = zip(columns[first[order]].tolist(), columns[second[order]].tolist(), strict=True)
    return [
        *(np.array([at]) for at in singles.tolist()),
        *(np.array(pair) for pair in doubles),
        *(new for new, _ in cluster_moves(plan)),
    ]
