"""Splitting nodes of the search, and closing what no plan within the limits can take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpq_plugins.solvers.quadratic import Quadratic
from mpq_plugins.solvers.relaxation import Nodes

_SINGLES = 5  # a unit with more open choices is split in two


def children(quadratic: Quadratic, slack: np.ndarray, parents: Sequence[Nodes]) -> tuple[Nodes, np.ndarray]:
    """The parents, each split at its least decided unit, and which of them every child comes from.

    `slack` [open, open] is the curvature within units: what it adds to the loss of fractions of choices, and takes from that
    of whole ones, is how far a unit is from decided.
    """
    joined = Nodes.joined(parents)
    units = _least_decided(quadratic, slack, joined)
    masks, source = [], []
    for at, unit in enumerate(units.tolist()):
        opened = joined.open[:, at]
        columns = np.flatnonzero(opened & (quadratic.unit_of == unit))
        for part in _parts(columns, joined.point[columns, at]):
            mask = opened.copy()
            mask[columns] = False
            mask[part] = True
            masks.append(mask)
            source.append(at)
    split = joined.take(np.array(source))
    split.open = np.stack(masks, axis=1)
    return split, np.array(source)


def within_limits(quadratic: Quadratic, nodes: Nodes) -> np.ndarray:
    """Close the columns that no plan within the limits takes; the index of the nodes that still have plans."""
    for cost, limit in zip(quadratic.cost, quadratic.limits, strict=True):
        least, more = quadratic.least(np.where(nodes.open, cost[:, None], np.inf))
        with np.errstate(invalid="ignore"):
            nodes.open &= least + more <= limit + 1e-12 * abs(limit)
    possible = quadratic.least(np.where(nodes.open, 0.0, np.inf))[0]
    return np.flatnonzero(np.isfinite(possible))


def _least_decided(quadratic: Quadratic, slack: np.ndarray, nodes: Nodes) -> np.ndarray:  # [node]
    """The unit with several open choices that is farthest from whole ones."""
    share = np.clip(nodes.point, 0.0, 1.0)
    gained = share * (np.diag(slack)[:, None] - slack @ share)
    n_units = quadratic.problem.n_units
    score, n_open = np.zeros((n_units, nodes.count)), np.zeros((n_units, nodes.count), dtype=int)
    np.add.at(score, quadratic.unit_of, gained)
    np.add.at(n_open, quadratic.unit_of, nodes.open)
    units: np.ndarray = np.argmax(np.where(n_open > 1, score, -np.inf), axis=0)
    return units


def _parts(columns: np.ndarray, share: np.ndarray) -> list[np.ndarray]:
    """One part for each of a few columns; two parts of about equal share of many."""
    if len(columns) <= _SINGLES:
        return [column[None] for column in columns]
    middle = int(np.searchsorted(np.cumsum(share), share.sum() / 2))
    middle = min(max(middle, 1), len(columns) - 1)
    return [columns[:middle], columns[middle:]]
