"""How to spread curvature within units so that the convex relaxation bounds best."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mpq_plugins.solvers.quadratic import Quadratic

_OVER_RELAXATION = 1.6
_BALANCE_EVERY = 20
_BALANCE = 1.6
_CLOSE = 1e-5


def best_blocks(quadratic: Quadratic, linear: np.ndarray, *, iterations: int, deadline: float) -> np.ndarray:
    """What to add within units [open, open] so that the relaxation of linear'x + x'Px / 2 bounds as high as it can.

    Within a unit x_m x_n = 0 and x_m^2 = x_m on plans, so any block can be added there and taken off again in the linear
    part. The best blocks are the multipliers of the semidefinite relaxation (quadratic convex reformulation: Billionnet,
    Elloumi and Lambert 2012), solved by alternating directions (Wen, Goldfarb and Yin 2010). Stopped early, they are only
    less good: `convex` adds what convexity still lacks.
    """
    lifted = _Lifted.of(quadratic, linear)
    multipliers = lifted.solve(iterations, deadline)
    blocks = np.zeros((len(quadratic.columns),) * 2)
    blocks[np.ix_(lifted.free, lifted.free)] = -2 * multipliers
    return blocks


@dataclass
class _Lifted:
    """min <objective, Z> over positive semidefinite Z = (1, t)(1, t)', t being all columns but the last of every unit.

    The rows Z_00 = 1, Z_mm = Z_0m and Z_mn = 0 within a unit touch different entries, so they are orthogonal.
    """

    objective: np.ndarray  # [1 + free, 1 + free], of norm 1
    scale: float
    free: np.ndarray  # [free], columns
    pairs: np.ndarray  # [free, free], whether two different columns are of one unit

    @classmethod
    def of(cls, quadratic: Quadratic, linear: np.ndarray) -> _Lifted:
        n = len(quadratic.columns)
        last = np.zeros(quadratic.problem.n_units, dtype=int)
        last[quadratic.unit_of] = np.arange(n)
        free = np.flatnonzero(last[quadratic.unit_of] != np.arange(n))
        lift = np.zeros((n, 1 + len(free)))
        lift[last, 0] = 1.0
        lift[free, 1 + np.arange(len(free))] = 1.0
        lift[last[quadratic.unit_of[free]], 1 + np.arange(len(free))] = -1.0
        objective = lift.T @ quadratic.own_blocks @ lift / 2
        slope = lift.T @ linear / 2
        objective[0] += slope
        objective[:, 0] += slope
        scale = float(np.linalg.norm(objective[1:, 1:])) or 1.0
        units = quadratic.unit_of[free]
        return cls(objective / scale, scale, free, (units[:, None] == units) & ~np.eye(len(free), dtype=bool))

    def solve(self, iterations: int, deadline: float) -> np.ndarray:  # [free, free]
        """Multipliers of the rows within units, in units of the loss."""
        size = len(self.objective)
        primal, slack, weight = np.eye(size), np.zeros((size, size)), 1.0
        combined = np.zeros((size, size))
        for step in range(iterations):
            if time.perf_counter() > deadline:
                break
            combined = self._combined(weight * primal + slack - self.objective, weight)
            target = self.objective - combined - weight * primal
            slack = _positive_part(target)
            primal += _OVER_RELAXATION * ((slack - target) / weight - primal)
            if step % _BALANCE_EVERY == _BALANCE_EVERY - 1:
                here = self._violation(primal) / float(np.linalg.norm(primal))
                there = float(np.linalg.norm(self.objective - combined - slack)) / 2
                if max(here, there) < _CLOSE:
                    break
                weight *= _BALANCE if here > 3 * there else 1 / _BALANCE if there > 3 * here else 1.0
        inner = combined[1:, 1:] * self.scale
        return np.where(self.pairs | np.eye(size - 1, dtype=bool), inner, 0.0)

    def _combined(self, residual: np.ndarray, weight: float) -> np.ndarray:
        """The rows, each times its best multiplier."""
        combined = np.zeros_like(residual)
        at = np.arange(1, len(residual))
        # Of the row Z_mm - Z_0m = 0 the squared norm is 1 + 1/2.
        own = -(np.diag(residual)[1:] - residual[0, 1:]) / 1.5
        combined[0, 0] = weight - residual[0, 0]
        combined[1:, 1:] = np.where(self.pairs, -residual[1:, 1:], 0.0)
        combined[at, at] = own
        combined[0, 1:] = combined[1:, 0] = -own / 2
        return combined

    def _violation(self, primal: np.ndarray) -> float:
        own = np.diag(primal)[1:] - primal[0, 1:]
        return float(np.sqrt((primal[0, 0] - 1) ** 2 + np.sum(own**2) + np.sum(primal[1:, 1:][self.pairs] ** 2)))


def _positive_part(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    part: np.ndarray
    positive = values > 0
    if 2 * positive.sum() < len(values):
        part = (vectors[:, positive] * values[positive]) @ vectors[:, positive].T
        return part
    rest = vectors[:, ~positive]
    part = matrix - (rest * values[~positive]) @ rest.T
    return part
