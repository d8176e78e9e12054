"""Which weight widths are measured, and what the others lose: a loss follows the squared error of the weights.

To second order the loss of a unit is a quadratic form of the error of its weights, so loss / squared error changes slowly with
the width. It is measured at every width up to 4 bits and at some wider ones, and taken over to those between and above.
"""

from __future__ import annotations

from collections.abc import Callable

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
    known = ~np.isnan(losses)
    if known.all():
        return losses
    error = np.asarray([squared_error(choice.weight) for choice in unit.choices])
    found: np.ndarray = np.where(known, losses, 0.0)
    exact = np.flatnonzero(known & (error > 0.0))
    exact, wanted = exact[np.argsort(error[exact], kind="stable")], ~known & (error > 0.0)
    if len(exact):
        ratio = np.interp(np.log(error[wanted]), np.log(error[exact]), losses[exact] / error[exact])
        found[wanted] = ratio * error[wanted]
    return found
