"""The convex relaxation of many nodes at once, by the alternating direction method of multipliers.

Any point gives a bound (see `Relaxed.bounds`), so nodes are left as soon as theirs is good enough, and start where their
parent stopped. One matrix product in single precision serves all of them, where an interior point method factors a matrix
for every node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpq_plugins.solvers.convex import Convex, Simplices
from mpq_plugins.solvers.quadratic import Quadratic

_OVER_RELAXATION = 1.6
_ROW_WEIGHT = 5.0
_ROUNDING = 1e-14


@dataclass
class Nodes:
    """Boxes of the search, one per column: which choices are open, and where the method of multipliers stands in each."""

    open: np.ndarray  # [open, node]
    point: np.ndarray  # [open, node]
    pull: np.ndarray  # [open, node], scaled multipliers of the box
    used: np.ndarray  # [limit, node]
    price: np.ndarray  # [limit, node], scaled multipliers of the limits

    def take(self, index: np.ndarray) -> Nodes:
        """Some of the nodes."""
        return Nodes(*(table[:, index] for table in vars(self).values()))

    @classmethod
    def joined(cls, nodes: Sequence[Nodes]) -> Nodes:
        """Several batches as one."""
        return cls(*(np.concatenate(tables, axis=1) for tables in zip(*(vars(node).values() for node in nodes), strict=True)))

    @property
    def count(self) -> int:
        """How many nodes there are."""
        return int(self.open.shape[1])


@dataclass(frozen=True)
class Bounds:
    """What the points of some nodes prove: bounds, the least loss with each choice taken, and the plan that attains it."""

    value: np.ndarray  # [node]
    with_choice: np.ndarray  # [open, node]
    values: np.ndarray  # [open, node], the linear function whose minimum is the bound
    prices: np.ndarray  # [limit, node]


@dataclass(frozen=True)
class Relaxed:
    """The convex relaxation of `quadratic`, set up for the method of multipliers with step `rho`."""

    quadratic: Quadratic
    form: Convex
    rho: float
    origin: np.ndarray  # [open]
    step: np.ndarray  # [open, open]
    rows: np.ndarray  # [limit, open], costs scaled to norm 1 along the simplices
    scale: np.ndarray  # [limit]

    @classmethod
    def of(cls, quadratic: Quadratic, form: Convex, simplices: Simplices, step: float) -> Relaxed:
        """Set up; `step` is the step in units of the mean curvature along the simplices."""
        basis = simplices.basis
        curvature = float(np.sum(basis * (form.hessian @ basis))) / max(1, basis.shape[1])
        rho = step * (curvature or float(np.ptp(form.linear)) or 1.0)
        norm = np.linalg.norm(quadratic.cost @ basis, axis=1)
        # A cost that no choice changes has no row.
        varies = norm > 1e-9 * np.abs(quadratic.cost).max(axis=1, initial=0.0)
        scale = np.where(varies, 1 / np.where(varies, norm, 1.0), 0.0)
        rows = quadratic.cost * scale[:, None]
        matrix = form.hessian + rho * (np.eye(len(form.hessian)) + _ROW_WEIGHT * rows.T @ rows)
        inner = np.linalg.inv(basis.T @ matrix @ basis)
        operator = basis @ inner @ basis.T
        origin = simplices.origin - operator @ (matrix @ simplices.origin + form.linear)
        single = np.float32
        return cls(quadratic, form, rho, origin.astype(single), (operator * rho).astype(single), rows.astype(single), scale)

    def start(self) -> Nodes:
        """The one node with everything open, in the middle."""
        n = len(self.origin)
        share = 1 / np.bincount(self.quadratic.unit_of)[self.quadratic.unit_of]
        point = share[:, None].astype(np.float32)
        limits, pull = np.zeros((len(self.rows), 1), dtype=np.float32), np.zeros((n, 1), dtype=np.float32)
        return Nodes(np.ones((n, 1), dtype=bool), point, pull, np.minimum(self.rows @ point, self._most), limits)

    @cached_property
    def within_units(self) -> np.ndarray:  # [open, open]
        """The curvature between choices of one unit."""
        units = self.quadratic.unit_of
        return np.where(units[:, None] == units, self.form.hessian, 0.0)

    @property
    def _most(self) -> np.ndarray:  # [limit, 1]
        most: np.ndarray = (self.quadratic.limits * self.scale)[:, None].astype(np.float32)
        return most

    def iterate(self, nodes: Nodes, count: int) -> None:
        """Take `count` steps in every node."""
        most, upper, rows = self._most, nodes.open.astype(np.float32), self.rows
        point, pull, used, price = nodes.point, nodes.pull, nodes.used, nodes.price
        for _ in range(count):
            flat = self.step @ (point - pull + _ROW_WEIGHT * (rows.T @ (used - price)))
            flat += self.origin[:, None]
            flow = _OVER_RELAXATION * (rows @ flat) + (1 - _OVER_RELAXATION) * used
            flat *= _OVER_RELAXATION
            flat += (1 - _OVER_RELAXATION) * point
            pull += flat
            point = np.minimum(np.maximum(pull, 0.0), upper)
            pull -= point
            price += flow
            used = np.minimum(price, most)
            price -= used
        nodes.point, nodes.pull, nodes.used, nodes.price = point, pull, used, price

    def bounds(self, nodes: Nodes) -> Bounds:
        """Lower bounds of the loss of every plan in each node, true however far the method still is from its end.

        For any point z, f(x) >= f(z) + grad f(z)'(x - z), and for prices >= 0 the least of a linear function over plans that
        agree is a sum of minima: no feasibility of z is needed.
        """
        form, quadratic = self.form, self.quadratic
        point = nodes.point.astype(float)
        curved = form.hessian @ point
        prices = np.maximum(self.rho * _ROW_WEIGHT * nodes.price, 0.0) * self.scale[:, None]
        values = curved + form.linear[:, None] + quadratic.cost.T @ prices
        offset = -np.sum(point * curved, axis=0) / 2 - quadratic.limits @ prices
        size = np.abs(offset) + np.abs(np.sum(point * np.abs(values), axis=0))
        values[~nodes.open] = np.inf
        least, more = quadratic.least(values)
        value = least + offset - _ROUNDING * len(values) * size
        more[~nodes.open] = np.inf
        return Bounds(value, value + more, values, prices)
