"""Random small allocation problems (see `mpq_plugins.testing`), and their linear relaxation by another library."""

from dataclasses import replace

import numpy as np
from scipy.optimize import linprog

from mpq_plugins import Problem
from mpq_plugins.testing import random_problem as random_problem


def linear_relaxation(problem: Problem) -> float:
    """Value of the relaxation by scipy's HiGHS: choices in fractions, one fraction per label shared within a group."""
    keys = sorted({(int(problem.cluster[u]), int(v)) for u, v in zip(problem.unit_of, problem.width, strict=True)})
    linked = {g for g in problem.cluster.tolist() if (problem.cluster == g).sum() > 1}
    columns = {key: len(problem.loss) + at for at, key in enumerate(keys)}
    rows, right = [], []
    for unit in range(problem.n_units):
        group = int(problem.cluster[unit])
        mine = np.flatnonzero(problem.unit_of == unit)
        for label in {key[1] for key in keys if key[0] == group} if group in linked else {None}:
            row = np.zeros(len(problem.loss) + len(keys))
            row[[c for c in mine if label is None or problem.width[c] == label]] = 1
            if label is not None:
                row[columns[group, label]] = -1
            rows.append(row)
            right.append(1.0 if label is None else 0.0)
    for group in linked:
        row = np.zeros(len(problem.loss) + len(keys))
        row[[columns[key] for key in keys if key[0] == group]] = 1
        rows.append(row)
        right.append(1.0)
    scale = np.ptp(problem.loss) or 1.0
    sizes = [abs(limit.limit) or 1.0 for limit in problem.limits]
    pad = np.zeros(len(keys))
    result = linprog(
        np.concatenate([problem.loss / scale, pad]),
        A_ub=[np.concatenate([limit.cost / size, pad]) for limit, size in zip(problem.limits, sizes, strict=True)] or None,
        b_ub=[limit.limit / size for limit, size in zip(problem.limits, sizes, strict=True)] or None,
        A_eq=np.array(rows),
        b_eq=right,
        method="highs",
    )
    return float(result.fun) * scale if result.success else np.inf


def with_limit(problem: Problem, row: int, limit: float) -> Problem:
    """The problem with another limit in one row."""
    limits = list(problem.limits)
    limits[row] = replace(limits[row], limit=limit)
    return replace(problem, limits=tuple(limits))
