"""What each unit may do instead of a base plan: the pieces that the dynamic program puts together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq_plugins.solvers.blocks import Blocks, Minimum


@dataclass(frozen=True)
class Stage:
    """What one unit may do instead of the base plan: how its cost changes, and by how much the bound rises."""

    unit: int
    used: np.ndarray  # [alternative], the first one stays at the base
    rise: np.ndarray  # [alternative]
    choice: np.ndarray  # [alternative]


def stages_of(
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
