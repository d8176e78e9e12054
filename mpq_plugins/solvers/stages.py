"""What each cluster may do instead of a base plan: the pieces that the dynamic program puts together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq_plugins.solvers.blocks import Blocks, Minimum

_MOST_COMBINATIONS = 20_000


@dataclass(frozen=True)
class Stage:
    """What one cluster may do instead of the base plan: how its cost changes, and by how much the bound rises.

    `lost` is the least rise among combinations of a large cluster that were left out for lack of room.
    """

    units: np.ndarray  # [unit of the cluster]
    used: np.ndarray  # [alternative], the first one stays at the base
    rise: np.ndarray  # [alternative]
    choice: np.ndarray  # [alternative, unit of the cluster]
    lost: float = np.inf


def stages_of(
    blocks: Blocks,
    minimum: Minimum,
    base: np.ndarray,  # [unit]
    price: float,
    *,
    most_rise: float,
    n_plans: int = 1,
    most_stages: int | None = None,
) -> list[Stage]:
    """The clusters with alternatives that raise the bound by `most_rise` or less, those that are cheapest to move first.

    `minimum` is the minimum at `price`, of which `base` is one.
    """
    table = _Table.of(blocks, minimum, base, price)
    kept = table.rise <= most_rise
    if blocks.is_linked:
        n_kept = np.bincount(blocks.cluster[blocks.option], weights=kept.sum(axis=1), minlength=blocks.n_clusters)
        stages = [
            _cluster_stage(blocks, table, cluster, base, most_rise=most_rise, price=price, n_plans=n_plans)
            for cluster in np.flatnonzero(n_kept > 1).tolist()
        ]
    else:
        moves = kept & (blocks.index != base[:, None])
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where(moves & (table.used != 0), table.rise / np.abs(table.used), np.inf).min(axis=1)
        units = np.flatnonzero(moves.any(axis=1))
        units = units[np.argsort(slope[units], kind="stable")][:most_stages]
        stages = [_unit_stage(blocks, table, unit, moves[unit], base) for unit in units.tolist()]
    return sorted(stages, key=_slope)[:most_stages]


@dataclass(frozen=True)
class _Table:
    """Cost change to the base plan and rise of the bound for every choice."""

    used: np.ndarray  # [slot, position]
    rise: np.ndarray  # [slot, position], within the option of the slot
    option_rise: np.ndarray  # [option]

    @classmethod
    def of(cls, blocks: Blocks, minimum: Minimum, base: np.ndarray, price: float) -> _Table:
        prices = np.full(len(blocks.limits), price)
        rise = blocks.reduced_costs(minimum, prices)
        if not len(blocks.limits):
            return cls(np.zeros_like(blocks.loss), rise, minimum.option_value - minimum.cluster_value[blocks.cluster])
        of_base = blocks.problem.limits[0].cost[blocks.problem.columns(base)]
        used = blocks.cost[0] - of_base[blocks.unit][:, None]
        return cls(used, rise, np.maximum(minimum.option_value - minimum.cluster_value[blocks.cluster], 0.0))


def _unit_stage(blocks: Blocks, table: _Table, unit: int, moves: np.ndarray, base: np.ndarray) -> Stage:
    return Stage(
        np.array([unit]),
        np.concatenate([[0.0], table.used[unit, moves]]),
        np.concatenate([[0.0], table.rise[unit, moves]]),
        np.concatenate([[base[unit]], blocks.index[unit, moves]])[:, None],
    )


def _cluster_stage(
    blocks: Blocks, table: _Table, cluster: int, base: np.ndarray, *, most_rise: float, price: float, n_plans: int
) -> Stage:
    """Every agreeing combination of a cluster's choices, less those that rise too much or are dominated."""
    slots = blocks.slots_of_cluster[cluster]
    units = np.unique(blocks.unit[slots])
    combined = [
        _combinations(blocks, table, slots[blocks.option[slots] == option], most_rise, price, n_plans)
        for option in np.unique(blocks.option[slots])
    ]
    used, rise, choice = (np.concatenate(parts) for parts in zip(*(part[:3] for part in combined), strict=True))
    other = np.any(choice != base[units], axis=1)
    return Stage(
        units,
        np.concatenate([[0.0], used[other]]),
        np.concatenate([[0.0], rise[other]]),
        np.concatenate([base[units][None], choice[other]]),
        min(part[3] for part in combined),
    )


def _combinations(
    blocks: Blocks, table: _Table, slots: np.ndarray, most_rise: float, price: float, n_plans: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Cost change, rise and choices of every combination of one option that counts, and the least rise left out."""
    lost = np.inf
    start = float(table.option_rise[blocks.option[slots[0]]])
    used, rise, choice = np.zeros(1), np.full(1, start), np.zeros((1, 0), dtype=int)
    for slot in slots[np.argsort(blocks.unit[slots])]:
        positions = np.flatnonzero(table.rise[slot] <= most_rise)
        parent, taken = pairs(len(used), len(positions))
        position = positions[taken]
        used = used[parent] + table.used[slot, position]
        rise = rise[parent] + (table.rise[slot, position] - start)
        alive = np.flatnonzero(rise <= most_rise)
        alive = alive[undominated(used[alive], (rise - price * used)[alive], n_plans)]
        if len(alive) > _MOST_COMBINATIONS:
            alive = alive[np.argsort(rise[alive], kind="stable")]
            lost = min(lost, float(rise[alive[_MOST_COMBINATIONS]]))
            alive = alive[:_MOST_COMBINATIONS]
        used, rise, choice = used[alive], rise[alive], np.column_stack([choice[parent], blocks.index[slot, position]])[alive]
    return used, rise, choice, lost


def _slope(stage: Stage) -> float:
    """Least rise per unit of cost that moving the stage takes."""
    moves = stage.used != 0
    return float(np.min(stage.rise[moves] / np.abs(stage.used[moves]), initial=np.inf))


def pairs(n_states: int, n_alternatives: int) -> tuple[np.ndarray, np.ndarray]:
    """Every state with every alternative."""
    return np.repeat(np.arange(n_states), n_alternatives), np.tile(np.arange(n_alternatives), n_states)


def undominated(used: np.ndarray, loss: np.ndarray, n_plans: int) -> np.ndarray:
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
