"""Dynamic program over the choices that the Lagrangian bound cannot rule out: exact for one limit, or none.

After Pisinger, "A minimal algorithm for the multiple-choice knapsack problem" (EJOR 83, 1995): units whose alternatives
cost least in the bound come first, and a state lives while its bound can still beat the plans at hand. Here the bound of
what is left is the upper envelope of Lagrangian bounds at a grid of prices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mpq_plugins.solvers.blocks import Blocks, Minimum
from mpq_plugins.solvers.lagrangian import Relaxation

_N_PRICES = 32
_FIRST_STAGES = 24
_FIRST_STATES = 4_000


@dataclass(frozen=True)
class Stage:
    """What one unit may do instead of the base plan: how its cost changes, and by how much the bound rises."""

    unit: int
    used: np.ndarray  # [alternative], the first one stays at the base
    rise: np.ndarray  # [alternative]
    choice: np.ndarray  # [alternative]


@dataclass(frozen=True)
class Found:
    """The best plans found, and what is proven of them.

    An excess is a loss above the value of the relaxation. No plan has an excess below `proven`, and none that is missing
    here one below `cut_off`.
    """

    plans: list[tuple[float, np.ndarray]]  # excess, choice [unit]; best first
    proven: float
    cut_off: float
    n_states: int


def nearest_plans(
    blocks: Blocks,
    relaxation: Relaxation,
    *,
    gap: float,
    max_states: int,
    n_plans: int = 1,
    threshold: float = np.inf,
) -> Found:
    """The `n_plans` best plans of a problem with one limit or none.

    `threshold` is an excess that `n_plans` plans are known to reach. One plan is searched until it is proven within the
    relative `gap`, several until they are proven to be the best.
    """
    problem, base = blocks.problem, relaxation.cheap.choice
    price = float(relaxation.prices.sum())
    minimum = blocks.minimum(relaxation.prices)
    slack = float(blocks.limits[0]) - problem.usage(base)[0] if problem.limits else 0.0
    excess = problem.objective(base) - relaxation.value
    best: list[tuple[float, np.ndarray]] = [(excess, base)]
    n_states = 0
    reach = min(threshold, excess) if n_plans == 1 else threshold
    for most_stages, room in ((_FIRST_STAGES, min(_FIRST_STATES, max_states)), (None, max_states)):
        tolerance = gap * abs(relaxation.value + reach) if n_plans == 1 else 0.0
        if n_plans == 1 and reach <= tolerance:
            return Found(best, min(0.0, reach), 0.0, n_states)
        stages = _stages(blocks, minimum, base, price, most_rise=reach, most_stages=most_stages)
        core = DynamicProgram(slack, price, reach, n_plans, room, tolerance)
        core.run(stages)
        n_states += core.n_states
        reach = min(reach, core.threshold)
        best = sorted([*best, *core.plans(base)], key=lambda plan: plan[0])[:1] if n_plans == 1 else core.plans(base)
    return Found(best, max(0.0, min([core.dropped, *(plan[0] for plan in best[:1])])), core.dropped, n_states)


def _stages(
    blocks: Blocks,
    minimum: Minimum,
    base: np.ndarray,  # [unit]
    price: float,
    *,
    most_rise: float,
    most_stages: int | None = None,
) -> list[Stage]:
    """The units with alternatives that raise the bound by `most_rise` or less, those that are cheapest to move first.

    `minimum` is the minimum at `price`, of which `base` is one.
    """
    rise = blocks.reduced_costs(minimum, np.full(len(blocks.limits), price))
    used = np.zeros_like(rise)
    if len(blocks.limits):
        used = blocks.cost[0] - blocks.problem.limits[0].cost[blocks.problem.columns(base)][:, None]
    moves = (rise <= most_rise) & (blocks.index >= 0) & (blocks.index != base[:, None])
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(moves & (used != 0), rise / np.abs(used), np.inf).min(axis=1)
    units = np.flatnonzero(moves.any(axis=1))
    return [
        Stage(
            unit,
            np.concatenate([[0.0], used[unit, moves[unit]]]),
            np.concatenate([[0.0], rise[unit, moves[unit]]]),
            np.concatenate([[base[unit]], blocks.index[unit, moves[unit]]]),
        )
        for unit in units[np.argsort(slope[units], kind="stable")][:most_stages].tolist()
    ]


@dataclass
class _Step:
    stage: Stage
    parent: np.ndarray  # [state]
    taken: np.ndarray  # [state]


@dataclass
class DynamicProgram:
    """Searches changes of a base plan, one stage at a time, and remembers the `n_plans` best.

    `excess` values are losses above the value of the relaxation. `threshold` is the excess that a new plan has to beat
    (reach, when several plans are wanted); `dropped` the least bound among the states given up for lack of room.
    """

    slack: float
    price: float
    threshold: float
    n_plans: int = 1
    max_states: int = 100_000
    tolerance: float = 0.0
    dropped: float = np.inf
    n_states: int = 0
    best: list[tuple[float, int, int]] = field(default_factory=list)  # excess, step, state
    _steps: list[_Step] = field(default_factory=list)

    def run(self, stages: Sequence[Stage]) -> None:
        """Search all combinations of the stages' alternatives that the bounds leave."""
        used, rise = np.zeros(1), np.zeros(1)
        rest = _Rest.of(stages, self.price)
        self._record(used, rise)
        for at, stage in enumerate(stages):
            useful = self._worthwhile(stage.rise)
            useful[0] = True
            if np.count_nonzero(useful) == 1:
                continue
            alternatives = np.flatnonzero(useful)
            # Every state with every alternative.
            parent, taken = (index.ravel() for index in np.indices((len(used), len(alternatives))))
            used = used[parent] + stage.used[alternatives][taken]
            rise = rise[parent] + stage.rise[alternatives][taken]
            bound = rise + rest.after(at, self.slack - used)
            alive = np.flatnonzero(self._worthwhile(bound))
            alive = alive[_undominated(used[alive], (rise - self.price * used)[alive], self.n_plans)]
            if len(alive) > self.max_states:
                order = np.argsort(bound[alive], kind="stable")
                self.dropped = min(self.dropped, float(bound[alive[order[self.max_states]]]))
                alive = np.sort(alive[order[: self.max_states]])
            used, rise = used[alive], rise[alive]
            self._steps.append(_Step(stage, parent[alive].astype(np.int32), alternatives[taken[alive]].astype(np.int32)))
            self.n_states += len(alive)
            self._record(used, rise)
            if not len(alive):
                break

    def plans(self, base: np.ndarray) -> list[tuple[float, np.ndarray]]:
        """Excess and choice of the best plans found, best first."""
        found = []
        for excess, step, state in self.best:
            choice = base.copy()
            for record in reversed(self._steps[:step]):
                choice[record.stage.unit] = record.stage.choice[record.taken[state]]
                state = int(record.parent[state])
            found.append((excess, choice))
        return found

    def _worthwhile(self, bound: np.ndarray) -> np.ndarray:
        """Which bounds promise more than what is known; notes the least one that the tolerance gives up."""
        if self.n_plans > 1:
            wanted: np.ndarray = bound <= self.threshold * (1 + 1e-12)
            return wanted
        given_up = (bound >= self.threshold - self.tolerance) & (bound < self.threshold)
        self.dropped = min(self.dropped, float(np.min(bound[given_up], initial=np.inf)))
        wanted = bound < self.threshold - self.tolerance
        return wanted

    def _record(self, used: np.ndarray, rise: np.ndarray) -> None:
        """Take note of the states that already are plans: what is left stays at the base."""
        plans = np.flatnonzero(used <= self.slack)
        if not len(plans):
            return
        excess = rise[plans] + self.price * (self.slack - used[plans])
        order = np.argsort(excess, kind="stable")[: self.n_plans]
        found = [(float(excess[i]), len(self._steps), int(plans[i])) for i in order]
        # More plans are better than fewer, then the least sum of their excesses.
        self.best = min(self.best, found, key=lambda plans: (-len(plans), sum(plan[0] for plan in plans)))
        if len(self.best) == self.n_plans:
            self.threshold = min(self.threshold, self.best[-1][0])


@dataclass(frozen=True)
class _Rest:
    """Lower bounds of what the stages not yet decided add, as a function of the slack left for them."""

    slope: np.ndarray  # [price]
    height: np.ndarray  # [stage + 1, price]

    @classmethod
    def of(cls, stages: Sequence[Stage], price: float) -> _Rest:
        slope = _price_grid(stages, price)
        added = np.zeros((len(stages) + 1, len(slope)))
        for at, stage in enumerate(stages):
            added[at] = (stage.rise[:, None] - stage.used[:, None] * slope).min(axis=0)
        return cls(slope, np.cumsum(added[::-1], axis=0)[::-1])

    def after(self, stage: int, slack: np.ndarray) -> np.ndarray:  # [state]
        """Least rise of the stages after `stage`, and of the slack that stays unused."""
        height = self.height[stage + 1]
        corners = -np.diff(height) / np.diff(self.slope)
        line = np.searchsorted(np.maximum.accumulate(corners), slack)
        bounds: np.ndarray = height[line] + self.slope[line] * slack
        return bounds


def _price_grid(stages: Sequence[Stage], price: float) -> np.ndarray:  # [price], ascending
    """Changes of the price at which bounds are kept: 0, the price itself, and quantiles of the stages' own slopes."""
    used = np.concatenate([stage.used for stage in stages]) if stages else np.zeros(0)
    rise = np.concatenate([stage.rise for stage in stages]) if stages else np.zeros(0)
    moves = (used != 0) & np.isfinite(rise)
    slopes = rise[moves] / used[moves]
    quantiles = np.linspace(0, 1, _N_PRICES)
    parts = [np.array([0.0, price])]
    for side in (slopes[slopes < 0], slopes[(slopes > 0) & (slopes < price)]):
        if len(side):
            parts.append(np.quantile(side, quantiles, method="nearest"))
    return np.unique(np.concatenate(parts))


def _undominated(used: np.ndarray, loss: np.ndarray, n_plans: int) -> np.ndarray:
    """Positions of the states that fewer than `n_plans` others beat in both cost and loss."""
    left = np.lexsort((loss, used))
    layers = []
    for _ in range(n_plans):
        best_before = np.concatenate([[np.inf], np.minimum.accumulate(loss[left])[:-1]])
        front = loss[left] < best_before
        layers.append(left[front])
        left = left[~front]
        if not len(left):
            break
    return np.concatenate(layers)
