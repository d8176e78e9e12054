"""Best-first search over the choices that the convex relaxation leaves open, many nodes at a time."""

from __future__ import annotations

import heapq
import itertools
import time
from dataclasses import dataclass, field

import numpy as np

from mpq_plugins.solvers._convex import Convex, Simplices
from mpq_plugins.solvers._iterated_search import Pool, descend, repair
from mpq_plugins.solvers._quadratic import Quadratic
from mpq_plugins.solvers._relaxation import Nodes, Relaxed

_STEP = 4.0  # of the method of multipliers, in units of the mean curvature; 3 to 6 measured best
_ITERATIONS = 15  # between two looks at the bounds
_ROOT_LOOKS = 40
_LOOKS = 8
_STALLED = 0.05  # share of the way to the cut-off that a look must gain
_BATCH = 64
_SINGLES = 5  # a unit with more open choices is split in two
_SHRUNK = 0.9
_PLAN_EVERY = 4  # batches between two local searches


@dataclass
class Tree:
    """The search of `quadratic` below the best plan in `pool`; plans that gain less than `gap` (relative) do not count."""

    quadratic: Quadratic
    form: Convex
    pool: Pool
    gap: float
    deadline: float
    nodes: int = 0
    prices: np.ndarray = field(default_factory=lambda: np.zeros(0))
    root_bound: float = -np.inf
    _heap: list[tuple[float, int, Nodes]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def cut_off(self) -> float:
        """Losses from here on are of no interest."""
        best = self.pool.best_loss
        return best - self.gap * abs(best) if np.isfinite(best) else np.inf

    @property
    def bound(self) -> float:
        """No plan has a lower loss."""
        return min([self.cut_off, *(bound for bound, _, _ in self._heap)])

    @property
    def is_closed(self) -> bool:
        """Whether no open node can hold a plan below the cut-off."""
        return not self._heap or self._heap[0][0] >= self.cut_off

    def run(self) -> None:
        """Search until closed or out of time."""
        relaxed = self._root()
        for batch in itertools.count():
            if self.is_closed or time.perf_counter() > self.deadline:
                break
            parents = self._next_parents(relaxed)
            nodes, bounds = _children(relaxed.quadratic, parents)
            self._explore(relaxed, nodes, bounds, looks=_LOOKS)
            if batch % _PLAN_EVERY == 0 and self._heap:
                self._round(relaxed, self._heap[0][2])

    def bound_root(self) -> Quadratic:
        """Only bound the whole problem; the columns that a better plan can have."""
        relaxed = self._root()
        return relaxed.quadratic.restricted(self._heap[0][2].open[:, 0]) if self._heap else relaxed.quadratic

    def _root(self) -> Relaxed:
        """Bound the whole problem, close what cannot be in a better plan, and set up again for what is left."""
        quadratic, form = self.quadratic, self.form
        while True:
            relaxed = Relaxed.of(quadratic, form, Simplices.of(quadratic), _STEP)
            self._explore(relaxed, relaxed.start(), np.array([-np.inf]), looks=_ROOT_LOOKS)
            if not self._heap:
                return relaxed
            bound, _, nodes = self._heap[0]
            self.root_bound = max(self.root_bound, bound)
            self._round(relaxed, nodes)
            left = quadratic.restricted(nodes.open[:, 0])
            if len(left.columns) > _SHRUNK * len(quadratic.columns) or time.perf_counter() > self.deadline:
                return relaxed
            kept = np.isin(quadratic.columns, left.columns)
            quadratic, form = left, form.restricted(kept)
            self._heap.clear()

    def _explore(self, relaxed: Relaxed, nodes: Nodes, known: np.ndarray, *, looks: int) -> None:
        """Bound `nodes` until they are closed or gain little, and keep those that stay open."""
        self.nodes += nodes.count
        for look in range(looks):
            open_nodes = _within_limits(relaxed.quadratic, nodes)
            nodes, known = nodes.take(open_nodes), known[open_nodes]
            if not nodes.count:
                return
            relaxed.iterate(nodes, _ITERATIONS)
            found = relaxed.bounds(nodes)
            before, known = known, np.fmax(known, found.value)
            if look == 0 and not len(self.prices):
                self.prices = found.prices[:, 0]
            if known[0] > before[0] and self.root_bound == -np.inf:
                self.prices = found.prices[:, 0]
            cut_off = self.cut_off
            nodes.open &= found.with_choice < cut_off
            alive = known < cut_off
            gained = known - before >= _STALLED * (cut_off - known)
            n_open = nodes.open.sum(axis=0)
            leaf = n_open <= _n_units(relaxed.quadratic)
            for at in np.flatnonzero(alive & leaf).tolist():
                self._meet(relaxed.quadratic, nodes.open[:, at])
            self._keep(nodes, known, np.flatnonzero(alive & ~leaf & ~gained))
            index = np.flatnonzero(alive & ~leaf & gained)
            nodes, known = nodes.take(index), known[index]
        self._keep(nodes, known, np.arange(nodes.count))

    def _keep(self, nodes: Nodes, known: np.ndarray, index: np.ndarray) -> None:
        for at in index.tolist():
            node = nodes.take(np.array([at]))
            heapq.heappush(self._heap, (float(known[at]), next(self._count), node.stored()))

    def _next_parents(self, relaxed: Relaxed) -> list[tuple[float, Nodes]]:
        """The open nodes of least bound, as many as have about a batch of children."""
        parents: list[tuple[float, Nodes]] = []
        while self._heap and len(parents) < _BATCH // 3:
            bound, _, node = heapq.heappop(self._heap)
            if bound < self.cut_off:
                parents.append((bound, node))
        return parents

    def _meet(self, quadratic: Quadratic, taken: np.ndarray) -> None:
        """Remember the only plan of a node, where there is one."""
        if taken.sum() == _n_units(quadratic):
            self._add(quadratic, np.flatnonzero(taken))

    def _round(self, relaxed: Relaxed, node: Nodes) -> None:
        """Remember the plan that a local search finds from the minimum of the bound of a node."""
        quadratic = relaxed.quadratic
        values = relaxed.bounds(node).with_choice[:, 0]
        order = np.lexsort((values, quadratic.unit_of))
        first = np.flatnonzero(np.concatenate([[True], np.diff(quadratic.unit_of[order]) > 0]))
        plan = self.pool.moved_to(quadratic, order[first])
        option = plan.quadratic.option_of_slot[plan.quadratic.slot_of[plan.taken]]
        if plan.quadratic.is_linked and len(np.unique(option)) != len(plan.quadratic.group_start):
            return
        repaired = repair(plan)
        if repaired is not None:
            self.pool.add(descend(repaired))

    def _add(self, quadratic: Quadratic, taken: np.ndarray) -> None:
        self.pool.add(self.pool.moved_to(quadratic, taken))


def _n_units(quadratic: Quadratic) -> int:
    return quadratic.problem.n_units


def _within_limits(quadratic: Quadratic, nodes: Nodes) -> np.ndarray:
    """Close the columns that no plan within the limits has; the nodes that still have plans."""
    possible = np.ones(nodes.count, dtype=bool)
    for cost, limit in zip(quadratic.cost, quadratic.limits, strict=True):
        least, more = quadratic.least(np.where(nodes.open, cost[:, None], np.inf))
        with np.errstate(invalid="ignore"):
            nodes.open &= least + more <= limit + 1e-12 * abs(limit)
        possible &= np.isfinite(least)
    possible &= np.all(np.logical_or.reduceat(nodes.open, quadratic.slot_start, axis=0), axis=0) | quadratic.is_linked
    possible &= nodes.open.sum(axis=0) >= _n_units(quadratic)
    return np.flatnonzero(possible)


def _children(quadratic: Quadratic, parents: list[tuple[float, Nodes]]) -> tuple[Nodes, np.ndarray]:
    """The parents split at their least decided unit, and the bounds they inherit."""
    masks, source = [], []
    for at, (_, node) in enumerate(parents):
        opened, share = node.open[:, 0], node.point[:, 0]
        columns = np.flatnonzero(opened & (quadratic.unit_of == _least_decided(quadratic, opened, share)))
        for part in _parts(columns, share[columns]):
            mask = opened.copy()
            mask[columns] = False
            mask[part] = True
            masks.append(mask)
            source.append(at)
    joined = Nodes.joined([node for _, node in parents]).take(np.array(source))
    joined.open = np.stack(masks, axis=1)
    return joined, np.array([parents[at][0] for at in source])


def _least_decided(quadratic: Quadratic, opened: np.ndarray, share: np.ndarray) -> int:
    """The unit with several open choices whose largest share is least."""
    n_units = _n_units(quadratic)
    largest = np.zeros(n_units)
    np.maximum.at(largest, quadratic.unit_of, share)
    several = np.bincount(quadratic.unit_of[opened], minlength=n_units) > 1
    return int(np.argmin(np.where(several, largest, np.inf)))


def _parts(columns: np.ndarray, share: np.ndarray) -> list[np.ndarray]:
    """One part for each of a few columns; two parts of about equal share of many."""
    if len(columns) <= _SINGLES:
        return [column[None] for column in columns]
    middle = int(np.searchsorted(np.cumsum(share), share.sum() / 2))
    middle = min(max(middle, 1), len(columns) - 1)
    return [columns[:middle], columns[middle:]]
