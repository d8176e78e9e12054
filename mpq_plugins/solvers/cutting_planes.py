"""The Lagrangian dual of several limits, by Kelley's cutting planes (J. SIAM 8(4), 1960)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mpq_plugins.solvers.blocks import Blocks, Minimum
from mpq_plugins.solvers.program import Backend, highest_point
from mpq_plugins.solvers.secants import Relaxation, by_secants

_MOST_CUTS = 200
_ROOM = 1e-10
_WIDER = 64.0
_MOST_WIDENINGS = 6


@dataclass
class _Peak:
    """Where the dual is largest so far, and the minima that cut it."""

    prices: np.ndarray
    minimum: Minimum
    value: float
    cuts: list[Minimum]


def by_cutting_planes(blocks: Blocks, free: Minimum, backend: Backend) -> Relaxation:
    """Maximise the dual: every minimum met is a plane above it, the highest point under all planes comes next.

    Any prices give a valid bound, so stopping early costs tightness, never truth.
    """
    starts = [_alone(blocks, row) for row in range(len(blocks.limits))]
    cuts = [free, *(minimum for _, minima in starts for minimum in minima)]
    peak = _Peak(np.zeros(len(blocks.limits)), free, free.loss, cuts)
    most = 16 * max(price for price, _ in starts) + 1.0
    for widening in range(_MOST_WIDENINGS):
        _climb(blocks, peak, most, backend)
        if peak.prices.max() < most * (1 - 1e-9):
            break
        if widening == 0 and _excludes_itself(blocks, free, backend):
            return Relaxation(np.inf, peak.prices, peak.minimum, free, tuple(peak.cuts), is_infeasible=True)
        most *= _WIDER
    return Relaxation(peak.value, peak.prices, peak.minimum, free, tuple(peak.cuts))


def _climb(blocks: Blocks, peak: _Peak, most: float, backend: Backend, *, with_loss: bool = True) -> None:
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
    _climb(blocks, peak, 1.0, backend, with_loss=False)
    return peak.value > 1e-9 * float(np.abs(blocks.limits).max())


def _alone(blocks: Blocks, row: int) -> tuple[float, tuple[Minimum, ...]]:
    """The price of one limit when the others are left out, with the minima there."""
    limits = blocks.problem.limits[row : row + 1]
    only = replace(blocks, problem=replace(blocks.problem, limits=limits), cost=blocks.cost[row : row + 1])
    free = only.minimum(np.zeros(1))
    if free.usage[0] <= only.limits[0]:
        return 0.0, ()
    relaxation = by_secants(only, free)
    if relaxation.is_infeasible:
        return 0.0, ()
    prices = np.zeros(len(blocks.limits))
    prices[row] = relaxation.prices[0]
    return float(relaxation.prices[0]), (blocks.minimum(prices), blocks.minimum(prices * (1 + 1e-9)))
