"""Random small allocation problems, and their linear relaxation by another library."""

from dataclasses import replace

import numpy as np
from scipy.optimize import linprog

from mpq_plugins import Problem

KINDS = ("plain", "tiny losses", "ties", "huge costs", "large losses", "whole costs", "free choices", "duplicates")


def random_problem(seed: int, n_limits: int) -> Problem:
    """1..7 units of 1..4 choices, half of the time linked in groups; losses of both signs; limits from tight to loose."""
    rng = np.random.default_rng([seed, n_limits])
    kind = KINDS[seed % len(KINDS)]
    sizes = rng.integers(1, 5, int(rng.integers(1, 8)))
    loss = [_losses(rng, kind, size) for size in sizes]
    costs = []
    for _ in range(n_limits):
        table = [_costs(rng, kind, size) for size in sizes]
        least, most = sum(row.min() for row in table), sum(row.max() for row in table)
        costs.append((table, float(least + (most - least) * rng.uniform(0.05, 0.9))))
    if kind == "duplicates":
        loss = [np.repeat(row, 2)[: len(row)] for row in loss]
        costs = [([np.repeat(row, 2)[: len(row)] for row in table], limit) for table, limit in costs]
    group = rng.integers(0, len(sizes) // 2 + 1, len(sizes)) if seed % 2 else None
    return Problem.of(loss, costs, cluster=group, width=[np.arange(size) % 2 for size in sizes])


def _losses(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    scale = {"tiny losses": 1e-9, "large losses": 1e7}.get(kind, 1.0)
    return rng.integers(0, 3, size).astype(float) if kind == "ties" else rng.normal(size=size) * scale


def _costs(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    if kind in ("ties", "whole costs"):
        return rng.integers(0, 5, size).astype(float)
    costs = rng.random(size) * (1e12 if kind == "huge costs" else 1.0)
    return np.where(rng.random(size) < 0.4, 0.0, costs) if kind == "free choices" else costs


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
