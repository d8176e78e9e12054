"""CPU seconds and proven gaps of the solvers on synthetic allocation problems, beside scipy's HiGHS.

Run: python benchmarks/knapsack.py [--quick] [--seconds 30]
Losses fall by 4 per bit times a log-normal sensitivity (a joint menu adds activation bits); costs are log-normal layer sizes
times bits, MACs times both widths, and activation sizes. CPU seconds are of the whole call in this process, one run each.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from mpq_plugins import AbstractSolver, Problem, solve
from mpq_plugins.solvers import MILP, Knapsack

SIZES = [
    (54, 7, 1), (200, 7, 1), (1_000, 7, 1), (10_000, 7, 1), (54, 49, 1), (200, 49, 1), (1_000, 49, 1), (10_000, 49, 1),
    (54, 7, 2), (54, 7, 3), (200, 7, 2), (200, 7, 3), (54, 49, 2), (1_000, 7, 2),
]  # fmt: skip
QUICK = [(54, 7, 1), (10_000, 7, 1), (54, 7, 2)]


def synthetic(n_units: int, n_choices: int, n_limits: int, seed: int = 0) -> Problem:
    """A problem with the numbers of a network: widths 2..8, or all pairs of weight and activation widths for 49 choices."""
    rng = np.random.default_rng(seed)
    widths = np.arange(2, 9)
    weight = widths if n_choices == 7 else np.repeat(widths, 7)
    activation = np.full(7, 8) if n_choices == 7 else np.tile(widths, 7)
    size = np.exp(rng.normal(10, 1.5, n_units)).round()[:, None]
    macs = size * np.exp(rng.normal(4, 1, n_units)).round()[:, None]
    elements = np.exp(rng.normal(8, 1, n_units)).round()[:, None]
    sensitivity = np.exp(rng.normal(0, 1.5, n_units))[:, None]
    loss = sensitivity * (4.0**-weight + 0.5 * rng.random((n_units, 1)) * 4.0**-activation)
    loss = loss * (1 + 0.01 * rng.random(loss.shape))
    tables = [size * weight / 8, macs * weight * activation, elements * activation + weight]
    spans = [(table.min(axis=1).sum(), table.max(axis=1).sum()) for table in tables]
    shares = (0.35, 0.45, 0.55)
    costs = [
        (table, float(least + share * (most - least)))
        for table, (least, most), share in zip(tables, spans, shares, strict=True)
    ]
    return Problem.of(loss.tolist(), costs[:n_limits])


def plain_highs(problem: Problem, seconds: float) -> tuple[str, float]:
    """scipy's 0/1 program of the whole problem, unscaled: its status and relative gap."""
    n = len(problem.loss)
    one = csr_matrix((np.ones(n), (problem.unit_of, np.arange(n))))
    rows = [LinearConstraint(one, 1, 1)]
    rows += [LinearConstraint(limit.cost[None] / limit.limit, -np.inf, 1.0) for limit in problem.limits]
    options = {"time_limit": seconds, "mip_rel_gap": 1e-9}
    result = milp(problem.loss, constraints=rows, integrality=np.ones(n), bounds=Bounds(0, 1), options=options)
    return ("optimal" if result.status == 0 else "stopped"), float(result.mip_gap) if result.mip_gap is not None else np.inf


def ours(problem: Problem, solver: AbstractSolver) -> tuple[str, float]:
    solution = solve(problem, solver, throw=False, n_next=0)
    return solution.status.name, solution.gap


def timed(run: Callable[[], tuple[str, float]]) -> str:
    started = time.process_time()
    status, gap = run()
    return f"{time.process_time() - started:8.3f} {status:9s} {gap:8.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds and proven gaps of the solvers.")
    parser.add_argument("--quick", action="store_true", help="three sizes only")
    parser.add_argument("--seconds", type=float, default=30.0, help="time limit of the 0/1 programs")
    arguments = parser.parse_args()
    print(f"{'units x choices, limits':26s}{'method':16s}{'CPU s':>8s} {'status':9s} {'gap':>8s}")
    for n_units, n_choices, n_limits in QUICK if arguments.quick else SIZES:
        problem = synthetic(n_units, n_choices, n_limits)
        runs: dict[str, Callable[[], tuple[str, float]]] = {}
        if n_limits == 1:
            runs["Knapsack 1e-6"] = lambda problem=problem: ours(problem, Knapsack(gap=1e-6))
            runs["Knapsack 1e-9"] = lambda problem=problem: ours(problem, Knapsack())
        if n_units < 10_000:
            runs["MILP"] = lambda problem=problem: ours(problem, MILP(time_limit_s=arguments.seconds))
        runs["scipy milp"] = lambda problem=problem: plain_highs(problem, arguments.seconds)
        for name, run in runs.items():
            print(f"{n_units:6d} x {n_choices:2d}, {n_limits:<13d}{name:16s}{timed(run)}", flush=True)


if __name__ == "__main__":
    main()
