"""The Lagrangian dual of one limit, by secants; and what solving a relaxation gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpq_plugins.solvers.blocks import Blocks, Minimum

_ROUNDING = 1e-13


@dataclass(frozen=True)
class Relaxation:
    """The linear relaxation, solved: its value bounds every plan from below, its prices are the shadow prices.

    `cheap` and `rich` are two minima at the prices, on either side of the limit when there is one that binds; `seen` holds
    the plans met on the way. `is_infeasible` means that not even fractions of choices meet all limits.
    """

    value: float
    prices: np.ndarray  # [limit]
    cheap: Minimum
    rich: Minimum
    seen: tuple[Minimum, ...] = ()
    is_infeasible: bool = False


def by_secants(blocks: Blocks, rich: Minimum) -> Relaxation:
    """Intersect the two lines that support the dual left and right of its peak until nothing lies below them."""
    limit = float(blocks.limits[0])
    cheap = blocks.minimum(np.ones(1), with_loss=False)
    if cheap.usage[0] > limit:
        return Relaxation(np.inf, np.zeros(1), cheap, rich, is_infeasible=True)
    while True:
        price = np.array([(cheap.loss - rich.loss) / (rich.usage[0] - cheap.usage[0])])
        middle = blocks.minimum(price)
        on_line = cheap.loss + price[0] * cheap.usage[0]
        below = on_line - (middle.loss + price[0] * middle.usage[0])
        if below <= _ROUNDING * (abs(cheap.loss) + abs(price[0] * cheap.usage[0])):
            value = min(blocks.bound(middle, price), blocks.bound(cheap, price))
            return Relaxation(value, price, cheap, rich, (cheap,))
        if middle.usage[0] <= limit:
            cheap = middle
        else:
            rich = middle
