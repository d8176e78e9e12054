"""The best prices of the limits: the Lagrangian dual, whose value is that of the linear relaxation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mpq_plugins.solvers.blocks import Blocks, Minimum
from mpq_plugins.solvers.program import Backend, highest_point

_ROUNDING = 1e-13
_MOST_CUTS = 200
_ROOM = 1e-10
_WIDER = 64.0
_MOST_WIDENINGS = 6


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


def relax(blocks: Blocks, *, backend: Backend = "auto") -> Relaxation:
    """Maximise the Lagrangian bound over prices >= 0: by secants for one limit, by cutting planes for several."""
    free = blocks.minimum(np.zeros(len(blocks.limits)))
    if np.all(free.usage <= blocks.limits):
        return Relaxation(free.loss, np.zeros(len(blocks.limits)), free, free, (free,))
    return _by_secants(blocks, free) if len(blocks.limits) == 1 else _by_cutting_planes(blocks, free, backend)


def _by_secants(blocks: Blocks, rich: Minimum) -> Relaxation:
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


@dataclass
class _Peak:
    """Where the dual is largest so far, and the minima that cut it."""

    prices: np.ndarray
    minimum: Minimum
    value: float
    cuts: list[Minimum]


def _by_cutting_planes(blocks: Blocks, free: Minimum, backend: Backend) -> Relaxation:
    """Every minimum met is a plane above the dual; the highest point under all planes comes next.

    Kelley, J. SIAM 8(4), 1960. Any prices give a valid bound, so stopping early costs tightness, never truth.
    """
    starts = [_alone(blocks, row) for row in range(len(blocks.limits))]
    cuts = [free, *(minimum for _, minima in starts for minimum in minima)]
    peak = _Peak(np.zeros(len(blocks.limits)), free, free.loss, cuts)
    most = np.array([16 * price for price, _ in starts])
    for widening in range(_MOST_WIDENINGS):
        _climb(blocks, peak, most, backend)
        at_edge = peak.prices >= most * (1 - 1e-9)
        if not at_edge.any():
            break
        if widening == 0 and _excludes_itself(blocks, free, backend):
            return Relaxation(np.inf, peak.prices, peak.minimum, free, tuple(peak.cuts), is_infeasible=True)
        most = np.where(at_edge, _WIDER * most, most)
    return Relaxation(peak.value, peak.prices, peak.minimum, free, tuple(peak.cuts))


def _climb(blocks: Blocks, peak: _Peak, most: np.ndarray, backend: Backend, *, with_loss: bool = True) -> None:
    """Raise the peak within 0 <= prices <= most until no plane leaves room above it."""
    met = {cut.choice.tobytes() for cut in peak.cuts}
    for _ in range(_MOST_CUTS):
        heights = [cut.loss if with_loss else 0.0 for cut in peak.cuts]
        highest = highest_point(heights, [cut.usage - blocks.limits for cut in peak.cuts], most, backend)
        if highest is None:
            return
        prices, ceiling = highest
        minimum = blocks.minimum(prices, with_loss=with_loss)
        value = (minimum.loss if with_loss else 0.0) + float(prices @ (minimum.usage - blocks.limits))
        peak.cuts.append(minimum)
        if value > peak.value:
            peak.prices, peak.minimum, peak.value = prices, minimum, value
        # A plane met before leaves no room either: what still shows is the rounding of the linear program.
        known = minimum.choice.tobytes() in met
        met.add(minimum.choice.tobytes())
        if known or ceiling - peak.value <= _ROOM * max(abs(ceiling), abs(peak.value)):
            return


def _excludes_itself(blocks: Blocks, free: Minimum, backend: Backend) -> bool:
    """Whether some weighting of the limits exceeds its own least usage, so that no mixture of choices meets them all."""
    peak = _Peak(np.zeros(len(blocks.limits)), free, 0.0, [free])
    _climb(blocks, peak, np.ones(len(blocks.limits)), backend, with_loss=False)
    return peak.value > 1e-9 * float(np.abs(blocks.limits).max())


def _alone(blocks: Blocks, row: int) -> tuple[float, tuple[Minimum, ...]]:
    """The price of one limit when the others are left out, or a guess where it is free, with the minima there."""
    limits = blocks.problem.limits[row : row + 1]
    guess = float(np.ptp(blocks.problem.loss)) / (float(np.ptp(limits[0].cost)) or 1.0)
    only = replace(blocks, problem=replace(blocks.problem, limits=limits), cost=blocks.cost[row : row + 1])
    relaxation = relax(only)
    if relaxation.is_infeasible or not relaxation.prices[0]:
        return guess or 1.0, ()
    prices = np.zeros(len(blocks.limits))
    prices[row] = relaxation.prices[0]
    return float(relaxation.prices[0]), (blocks.minimum(prices), blocks.minimum(prices * (1 + 1e-9)))
