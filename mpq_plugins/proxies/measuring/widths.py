"""Which weight widths are measured, and what the others lose: a loss follows the squared error of the weights.

To second order the loss of a unit is a quadratic form of the error of its weights, so loss / squared error changes slowly with
the width. It is measured at every width up to 4 bits and at some wider ones, and taken over to those between and above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mpq_plugins.space.space import Unit

_NARROW = 4  # bits up to which every width is measured


def measured_choices(unit: Unit) -> list[int]:
    """Indices of the choices that are measured: all, where activations have a choice too.

    Of widths above 4 bits in ascending order, one is left out when the one before is measured: 5 and 8 of {2,3,4,5,6,8}, 8 of
    {2,4,8}, 5, 7 of {3,4,5,6,7,8}. Some width is always measured.
    """
    order = sorted(range(len(unit.choices)), key=lambda index: unit.choices[index].weight)
    if len({choice.activation for choice in unit.choices}) > 1:
        return sorted(order)
    kept: list[int] = []
    skipped = True
    for index in order:
        skipped = bool(kept) and not skipped and unit.choices[index].weight > _NARROW
        if not skipped:
            kept.append(index)
    return sorted(kept)


def filled(unit: Unit, losses: np.ndarray, squared_error: Callable[[int], float]) -> np.ndarray:
    """Losses [choice] of a unit with those that are not measured (NaN) put in.

    `squared_error` gives that of the unit's weights at a width. Loss per squared error is linear in the logarithm of the error
    between measured widths, and beyond them that of the nearest.
    """
    known = [index for index in range(len(losses)) if not np.isnan(losses[index])]
    if len(known) == len(losses):
        return losses
    error = np.asarray([squared_error(choice.weight) for choice in unit.choices])
    found: np.ndarray = losses.copy()
    exact = [index for index in known if error[index] > 0.0]
    for index in sorted(set(range(len(losses))) - set(known)):
        found[index] = _between(exact, losses, error, index) if exact and error[index] > 0.0 else 0.0
    return found


def _between(known: Sequence[int], losses: np.ndarray, error: np.ndarray, index: int) -> float:
    """Loss at `index` by the loss per squared error of the measured choices around it."""
    ascending = sorted(known, key=lambda other: float(error[other]))
    at = [math.log(error[other]) for other in ascending]
    ratio = [float(losses[other] / error[other]) for other in ascending]
    return float(np.interp(math.log(error[index]), at, ratio) * error[index])
