"""The pairwise loss as a convex function that agrees with it on every plan."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mpq_plugins.solvers.quadratic import Quadratic

_ROUNDING = 1e-13
_NEARLY = 1e-3


@dataclass(frozen=True)
class Convex:
    """x'Hx / 2 + linear'x, convex wherever every unit takes one choice in all, and equal to the loss on plans."""

    hessian: np.ndarray  # [open, open]
    linear: np.ndarray  # [open]
    shift: float  # what had to be added to the diagonal

    @property
    def was_lacking(self) -> bool:
        """Whether the loss had more negative curvature than rounding leaves."""
        return self.shift > _NEARLY * float(np.abs(np.diag(self.hessian)).mean())

    def restricted(self, kept: np.ndarray) -> Convex:
        """The same over some of the columns: what is left out is not taken."""
        return replace(self, hessian=self.hessian[np.ix_(kept, kept)], linear=self.linear[kept])


@dataclass(frozen=True)
class Simplices:
    """The points where every unit takes one choice in all, and linked units as much of each width: origin + basis t."""

    origin: np.ndarray  # [open]
    basis: np.ndarray  # [open, free], orthonormal

    @classmethod
    def of(cls, quadratic: Quadratic) -> Simplices:
        """From the equations of `quadratic`."""
        rows, right = _equations(quadratic)
        full, upper = np.linalg.qr(rows.T, mode="complete")
        n_rows = len(rows)
        origin = full[:, :n_rows] @ np.linalg.solve(upper[:n_rows].T, right)
        return cls(origin, full[:, n_rows:])


def _equations(quadratic: Quadratic) -> tuple[np.ndarray, np.ndarray]:  # [row, open], [row]
    """One choice for every unit; of every width but the last of a cluster, each unit as much as the first unit."""
    units = np.unique(quadratic.unit_of)
    rows = [quadratic.unit_of == unit for unit in units]
    equal = []
    slots_of_option = np.split(np.arange(len(quadratic.slot_start)), quadratic.option_start[1:])
    is_last = np.append(np.diff(quadratic.cluster_of_option), 1) > 0
    for slots, last in zip(slots_of_option, is_last, strict=True):
        for slot in [] if last else slots[1:]:
            equal.append((quadratic.slot_of == slot).astype(float) - (quadratic.slot_of == slots[0]))
    table = np.array([*rows, *equal], dtype=float).reshape(-1, len(quadratic.columns))
    return table, np.concatenate([np.ones(len(units)), np.zeros(len(equal))])


def convex(quadratic: Quadratic, simplices: Simplices, blocks: np.ndarray | None = None) -> Convex:
    """The convex form; `blocks` [open, open] is added within units, and taken off again in the linear part.

    What then is left of negative curvature is met by the same amount on all of the diagonal, where x'x = number of units.
    """
    hessian = quadratic.own_blocks if blocks is None else quadratic.own_blocks + blocks
    along = simplices.basis.T @ hessian @ simplices.basis
    least = float(np.linalg.eigvalsh(along)[0]) if len(along) else np.inf  # inf where there is nothing to decide
    largest = float(np.abs(hessian).max(initial=0.0))
    shift = max(0.0, _ROUNDING * len(hessian) * largest - least)
    hessian = hessian + shift * np.eye(len(hessian))
    return Convex(hessian, quadratic.loss - np.diag(hessian) / 2, shift)
