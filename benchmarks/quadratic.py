"""CPU seconds, nodes and proven gaps of the quadratic solvers on synthetic pairwise problems.

Run: python benchmarks/quadratic.py [--quick] [--seconds 60] [--seeds 3]
Losses are Gram matrices of random logit changes that fall by half per bit and share a common direction, as those of a network
do. "noisy" adds symmetric noise of a quarter of sqrt(P_mm P_nn), the sampling error of exact pairs, which makes P indefinite;
"clipped" drops the entries within units of a noisy P and its negative eigenvalues, CLADO's published repair; "joint" has a
weight width from 2, 3, 4, 8 and an activation width from 4, 8 in each choice, and limits on size and bit operations.
CPU seconds are of the whole call in this process, one run each; the heuristic's distance is that of the local search alone
(60 kicks) from the best plan known.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from mpq_plugins import AbstractSolver, Problem, Solution, solve
from mpq_plugins.solvers import BranchAndBound, Linearized, LocalSearch

BITS = {3: (2, 4, 8), 4: (2, 3, 4, 8)}
CASES = [
    ("gram", 50, 4), ("gram", 72, 3), ("gram", 100, 3), ("gram", 100, 4), ("gram", 200, 3), ("gram", 200, 4),
    ("clipped", 50, 4), ("noisy", 16, 4), ("noisy", 21, 4), ("noisy", 30, 4), ("noisy", 50, 4),
    ("joint", 30, 8), ("joint", 100, 8), ("joint", 200, 8),
]  # fmt: skip
QUICK = [("gram", 50, 4), ("gram", 72, 3), ("noisy", 21, 4)]


def gram(n_units: int, n_choices: int, seed: int, kind: str = "gram", rank: int = 48) -> Problem:
    """Weight widths under a size limit of four bits on average."""
    rng = np.random.default_rng(seed)
    bits = np.array(BITS[n_choices])
    shared = 0.6 * rng.normal(size=rank) + 0.8 * rng.normal(size=(n_units, rank))
    scale = np.exp(rng.normal(0, 0.7, n_units))[:, None]
    changes = np.zeros((n_units, n_choices, rank))
    for choice, width in enumerate(bits):
        changes[:, choice] = scale * 2.0**-width * (0.7 * shared + 0.7 * rng.normal(size=(n_units, rank)))
    flat = changes.reshape(-1, rank) / np.sqrt(rank)
    pairwise = flat @ flat.T
    if kind != "gram":
        pairwise = _noisy(pairwise, rng)
    if kind == "clipped":
        pairwise = _clipped(pairwise, n_choices)
    elements = np.exp(rng.normal(0, 1, n_units))
    elements = np.round(1000 * elements / elements.mean())
    problem = Problem.of(np.zeros((n_units, n_choices)), [(elements[:, None] * bits, 4.0 * float(elements.sum()))])
    return replace(problem, pairwise=pairwise)


def _noisy(pairwise: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(size=pairwise.shape)
    deviation = np.sqrt(np.outer(np.diag(pairwise), np.diag(pairwise)))
    noisy = pairwise + 0.25 * deviation * (noise + noise.T) / 2
    np.fill_diagonal(noisy, np.diag(pairwise))
    return noisy


def _clipped(pairwise: np.ndarray, n_choices: int) -> np.ndarray:
    unit = np.arange(len(pairwise)) // n_choices
    within = (unit[:, None] == unit) & ~np.eye(len(pairwise), dtype=bool)
    values, vectors = np.linalg.eigh(np.where(within, 0.0, pairwise))
    return (vectors * np.clip(values, 0, None)) @ vectors.T


def joint(n_units: int, seed: int, rank: int = 96) -> Problem:
    """Weight and activation widths under limits on size and bit operations."""
    rng = np.random.default_rng(seed)
    weight, activation = np.repeat([2, 3, 4, 8], 2), np.tile([4, 8], 4)
    common = 0.6 * rng.normal(size=rank)
    scales = np.exp(rng.normal([[0.0], [-1.0]], 0.7, (2, n_units)))
    shared = common + 0.8 * rng.normal(size=(2, n_units, rank))
    change = {}
    for at, widths in enumerate(((2, 3, 4, 8), (4, 8))):
        for width in widths:
            own = 0.7 * shared[at] + 0.7 * rng.normal(size=(n_units, rank))
            change[at, width] = scales[at][:, None] * 2.0**-width * own
    stacked = np.stack([change[0, w] + change[1, a] for w, a in zip(weight, activation, strict=True)], axis=1)
    flat = stacked.reshape(-1, rank) / np.sqrt(rank)
    elements = np.exp(rng.normal(0, 1, n_units))
    elements = np.round(1000 * elements / elements.mean())
    macs = elements * np.exp(rng.normal(0, 1, n_units))
    size = (elements[:, None] * weight, 4.0 * float(elements.sum()))
    operations = (macs[:, None] * weight * activation, 24.0 * float(macs.sum()))
    return replace(Problem.of(np.zeros((n_units, 8)), [size, operations]), pairwise=flat @ flat.T)


def built(kind: str, n_units: int, n_choices: int, seed: int) -> Problem:
    return joint(n_units, seed) if kind == "joint" else gram(n_units, n_choices, seed, kind)


def solvers(kind: str, n_units: int, seconds: float) -> Iterator[AbstractSolver]:
    yield BranchAndBound(time_limit_s=seconds)
    if kind == "noisy" and n_units <= 21:
        yield Linearized(time_limit_s=seconds)


def timed(problem: Problem, solver: AbstractSolver) -> tuple[Solution, float]:
    started = time.process_time()
    solution = solve(problem, solver, n_next=0)
    return solution, time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds, nodes and gaps of the quadratic solvers.")
    parser.add_argument("--quick", action="store_true", help="three sizes only")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each solver, wall time")
    parser.add_argument("--seeds", type=int, default=3, help="instances of each size")
    arguments = parser.parse_args()
    print("| problem, units x choices | seed | solver | CPU s | nodes | gap | local search: CPU s | and above the best by |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, n_units, n_choices in QUICK if arguments.quick else CASES:
        for seed in range(arguments.seeds):
            problem = built(kind, n_units, n_choices, seed)
            heuristic, heuristic_s = timed(problem, LocalSearch())
            for solver in solvers(kind, n_units, arguments.seconds):
                found, seconds = timed(problem, solver)
                above = (heuristic.objective - min(found.objective, heuristic.objective)) / abs(found.objective)
                told = f"{found.gap:.1e}" if found.gap > 0 else "0"
                print(
                    f"| {kind}, {n_units} x {n_choices} | {seed} | {solver.name} | {seconds:.1f} | {found.nodes:,} | {told} "
                    f"| {heuristic_s:.1f} | {above:.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
