"""Best-first search over the choices that the convex relaxation leaves open, many nodes at a time."""

from __future__ import annotations

import heapq
import itertools
import time
from dataclasses import dataclass, field

import numpy as np

from mpq_plugins.solvers.branching import children, within_limits
from mpq_plugins.solvers.convex import Simplices, convex
from mpq_plugins.solvers.curvature import best_blocks
from mpq_plugins.solvers.deadline import is_over
from mpq_plugins.solvers.iterated_search import Pool, descend, repair
from mpq_plugins.solvers.quadratic import Quadratic
from mpq_plugins.solvers.relaxation import Nodes, Relaxed

_STEP = 4.0  # of the method of multipliers, in units of the mean curvature; 3 to 6 measured best
_ITERATIONS = 15  # between two looks at the bounds
_ROOT_LOOKS = 40
_LOOKS = 8
_STALLED = 0.1  # share of the way to the cut-off that a look must gain
_PARENTS = 42  # split at a time: about 128 children
_SHRUNK = 0.9
_WITHIN = 0.99  # of the gap, so that it holds after rounding
_PLAN_EVERY = 4  # batches between two local searches
_MOST_BYTES = 5e8  # of open nodes; beyond, those nearest to their end go first
_TIGHTENINGS = 400
# Of dense linear algebra on n columns, as bounding a whole problem needs, per n^3: a guess for a slow core.
_SECONDS_PER_CUBE = 1.5e-9
_SLACK_S = 0.5  # what may be begun in spite of the limit
_NODES_PER_CUBE = 40.0  # measured: a node takes some n^2, tightening some n^3


@dataclass
class Tree:
    """The search of `quadratic` below the best plan in `pool`; plans that gain less than `gap` (relative) do not count.

    `deadline` is a value of `time.perf_counter`. Better plans are added to `pool`.
    """

    quadratic: Quadratic
    pool: Pool
    gap: float
    deadline: float
    nodes: int = 0
    prices: np.ndarray = field(default_factory=lambda: np.zeros(0))
    _floor: float = -np.inf
    _is_bounded: bool = False
    _heap: list[tuple[float, int, Nodes]] = field(default_factory=list)
    _count: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def cut_off(self) -> float:
        """Losses from here on are of no interest."""
        best = self.pool.best_loss
        return best - _WITHIN * self.gap * abs(best) if np.isfinite(best) else np.inf

    @property
    def bound(self) -> float:
        """No plan has a lower loss."""
        if not self._is_bounded:
            return _least_apart(self.quadratic)
        return min(self.cut_off, max(self._floor, min((bound for bound, _, _ in self._heap), default=np.inf)))

    @property
    def is_closed(self) -> bool:
        """Whether no open node can hold a plan below the cut-off."""
        return self.bound >= self.cut_off

    def has_time(self, quadratic: Quadratic) -> bool:
        """Whether there is time for the dense linear algebra of bounding all of `quadratic`."""
        seconds = _SECONDS_PER_CUBE * float(len(quadratic.columns)) ** 3
        return time.perf_counter() + seconds < self.deadline + _SLACK_S

    def run(self) -> None:
        """Search until closed or out of time."""
        if not self.has_time(self.quadratic):
            return
        relaxed = self.root()
        tightened = relaxed.form.was_lacking
        for batch in itertools.count():
            if self.is_closed or is_over(self.deadline):
                break
            if not tightened and self.nodes > _nodes_to_tighten(relaxed.quadratic):
                relaxed, tightened = self._tightened(relaxed), True
            else:
                self._split(relaxed)
                if batch % _PLAN_EVERY == 0 and self._heap:
                    self._round(relaxed, self._heap[0][2])

    def root(self) -> Relaxed:
        """Bound the whole problem, and set up for the choices that a better plan can have."""
        simplices = Simplices.of(self.quadratic)
        form = convex(self.quadratic, simplices)
        relaxed = self._closed_in(Relaxed.of(self.quadratic, form, simplices, _STEP))
        lacks = form.was_lacking and not self.is_closed
        return self._tightened(relaxed) if lacks and self.has_time(relaxed.quadratic) else relaxed

    def _closed_in(self, relaxed: Relaxed) -> Relaxed:
        """Bound all plans among the open choices; close choices, and set up again while many close."""
        while True:
            self._heap.clear()
            self._explore(relaxed, relaxed.start(), np.array([self._floor]), looks=_ROOT_LOOKS)
            self._is_bounded = True
            if not self._heap:
                return relaxed
            self._floor, _, nodes = self._heap[0]
            self.prices = relaxed.bounds(nodes).prices[:, 0]
            self._round(relaxed, nodes)
            left = relaxed.quadratic.restricted(nodes.open[:, 0])
            if len(left.columns) > _SHRUNK * len(relaxed.quadratic.columns) or not self.has_time(left):
                return relaxed
            form = relaxed.form.restricted(np.isin(relaxed.quadratic.columns, left.columns))
            relaxed = Relaxed.of(left, form, Simplices.of(left), _STEP)

    def _tightened(self, relaxed: Relaxed) -> Relaxed:
        """Start again with the curvature spread so that the bound is higher, if it is."""
        quadratic, before = relaxed.quadratic, (self._heap, self._floor, self.bound)
        simplices = Simplices.of(quadratic)
        linear = quadratic.problem.loss[quadratic.columns] + self.prices @ quadratic.cost
        half_way = (time.perf_counter() + self.deadline) / 2
        blocks = best_blocks(quadratic, linear, iterations=_TIGHTENINGS, deadline=half_way)
        tighter = Relaxed.of(quadratic, convex(quadratic, simplices, blocks), simplices, _STEP)
        self._heap, self._floor = [], -np.inf
        self._explore(tighter, tighter.start(), np.array([-np.inf]), looks=_ROOT_LOOKS)
        is_higher = self.bound > before[1]
        self._heap, self._floor = before[0], max(before[1], before[2])
        return self._closed_in(tighter) if is_higher else relaxed

    def _split(self, relaxed: Relaxed) -> None:
        """Split the open nodes of least bound."""
        n_bytes = 9 * len(relaxed.quadratic.columns) * len(self._heap)
        if n_bytes > _MOST_BYTES:
            self._heap.sort(key=lambda node: node[:2])
            parents = [self._heap.pop() for _ in range(_PARENTS)]
        else:
            parents = [heapq.heappop(self._heap) for _ in range(min(_PARENTS, len(self._heap)))]
        parents = [parent for parent in parents if parent[0] < self.cut_off]
        if parents:
            nodes, source = children(relaxed.quadratic, relaxed.within_units, [node for _, _, node in parents])
            self._explore(relaxed, nodes, np.array([parents[at][0] for at in source]), looks=_LOOKS)

    def _explore(self, relaxed: Relaxed, nodes: Nodes, known: np.ndarray, *, looks: int) -> None:
        """Bound `nodes`, whose bounds are at least `known`, until they are closed or gain little; keep what stays open."""
        self.nodes += nodes.count
        for _ in range(looks):
            possible = within_limits(relaxed.quadratic, nodes)
            nodes, known = nodes.take(possible), known[possible]
            if not nodes.count:
                return
            relaxed.iterate(nodes, _ITERATIONS)
            found = relaxed.bounds(nodes)
            before, known = known, np.fmax(known, found.value)
            nodes.open &= ~(found.with_choice >= self.cut_off)
            alive, n_open = known < self.cut_off, nodes.open.sum(axis=0)
            single = n_open <= relaxed.quadratic.problem.n_units
            for at in np.flatnonzero(alive & single).tolist():
                taken = np.flatnonzero(nodes.open[:, at])
                if len(taken) == relaxed.quadratic.problem.n_units:  # the only plan of the node, where there is one
                    self.pool.add(self.pool.moved_to(relaxed.quadratic, taken))
            gained = known - before >= _STALLED * (self.cut_off - known)
            self._keep(nodes, known, np.flatnonzero(alive & ~single & ~gained))
            index = np.flatnonzero(alive & ~single & gained)
            nodes, known = nodes.take(index), known[index]
            if is_over(self.deadline):
                break
        self._keep(nodes, known, np.arange(nodes.count))

    def _keep(self, nodes: Nodes, known: np.ndarray, index: np.ndarray) -> None:
        for at in index.tolist():
            heapq.heappush(self._heap, (float(known[at]), next(self._count), nodes.take(np.array([at]))))

    def _round(self, relaxed: Relaxed, node: Nodes) -> None:
        """Remember the plan that a local search finds from the one that attains the bound of a node."""
        taken = relaxed.quadratic.attaining(relaxed.bounds(node).values[:, 0])
        repaired = repair(self.pool.moved_to(relaxed.quadratic, taken))
        if repaired is not None:
            self.pool.add(descend(repaired, self.deadline))


def _least_apart(quadratic: Quadratic) -> float:
    """The least losses of units and of their pairs, each chosen apart: a bound that costs next to nothing."""
    starts = np.flatnonzero(np.diff(quadratic.unit_of, prepend=-1))
    pairs = np.minimum.reduceat(np.minimum.reduceat(quadratic.pairs, starts, axis=0), starts, axis=1)
    parts = (np.minimum.reduceat(quadratic.loss, starts).sum(), pairs.sum() / 2)
    return float(sum(parts) - 1e-9 * sum(map(abs, parts)))


def _nodes_to_tighten(quadratic: Quadratic) -> float:
    """How many nodes take as long as tightening: counted, not timed, so that equal problems are searched equally."""
    n_columns = len(quadratic.columns)
    return _NODES_PER_CUBE * float(n_columns - quadratic.problem.n_units) ** 3 / n_columns**2
