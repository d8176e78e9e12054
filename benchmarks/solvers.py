"""CPU seconds of the solvers, as ratios to a plain 0/1 program through PuLP and HiGHS in the same run.

Run: python benchmarks/solvers.py [--quick] [--seconds 60]

Linear problems: losses fall by 4 per bit times a log-normal sensitivity; costs are log-normal layer sizes times bits, MACs
times both widths, and activation sizes. 49 choices are all pairs of a weight and an activation width.
Pairwise problems: Gram matrices of random logit changes that fall by half per bit and share a direction. "noisy" adds the
sampling error of exact pairs, which makes them indefinite. "clipped" is CLADO's published repair of that. "joint" has 8
pairs of widths per unit and two limits. The plain program is given a variable for every product of two choices.
CPU seconds are of the solver alone in this process, with what it starts; the time limit is wall time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pulp

from mpq_plugins import AbstractSolver, Problem, Solution, Status
from mpq_plugins.solvers import MILP, BranchAndBound, Knapsack, LocalSearch
from mpq_plugins.solvers.scaling import Scaling

LINEAR = [*itertools.product((54, 200, 1_000), (7, 49), (1, 2, 3)), (10_000, 7, 1)]
PAIRED = [
    ("gram", 50, 4), ("gram", 100, 4), ("gram", 200, 4), ("clipped", 50, 4), ("noisy", 12, 4), ("noisy", 16, 4),
    ("noisy", 21, 4), ("noisy", 30, 4), ("noisy", 50, 4), ("joint", 30, 8), ("joint", 100, 8), ("joint", 200, 8),
]  # fmt: skip
QUICK = [(54, 7, 1), (54, 7, 2), (54, 49, 3)], [("gram", 50, 4), ("noisy", 12, 4)]
BITS = (2, 3, 4, 8)
MOST_PRODUCTS = 4_000  # what the plain program of a pairwise problem is built for


@dataclass(frozen=True)
class Plain(AbstractSolver):
    """The obvious 0/1 program: a variable for every choice, and for every product of two choices that interact."""

    name: ClassVar[str] = "plain"
    time_limit_s: float = 60.0
    gap: float = 1e-9

    def solve(self, problem: Problem) -> Solution:
        """The optimum, for units that need not agree."""
        program = pulp.LpProblem("plain", pulp.LpMinimize)
        picks = np.array([pulp.LpVariable(f"x{at}", cat="Binary") for at in range(len(problem.loss))])
        units = np.split(np.arange(len(picks)), problem.start[1:-1])
        objective = list(zip(picks, problem.loss.tolist(), strict=True))
        for columns in units:
            program += pulp.lpSum(picks[columns]) == 1
        for limit in problem.limits:
            program += pulp.LpAffineExpression(list(zip(picks, limit.cost.tolist(), strict=True))) <= limit.limit
        if problem.pairwise is not None:
            objective += zip(picks, (np.diag(problem.pairwise) / 2).tolist(), strict=True)
            for first, second in itertools.combinations(units, 2):
                both = np.array([[pulp.LpVariable(f"y{m}_{n}", 0, 1) for n in second] for m in first])
                objective += zip(both.ravel(), problem.pairwise[np.ix_(first, second)].ravel().tolist(), strict=True)
                for ends, rows in ((first, both), (second, both.T)):
                    for pick, row in zip(picks[ends], rows, strict=True):
                        program += pulp.lpSum(row) == pick
        program += pulp.LpAffineExpression(objective)
        program.solve(pulp.HiGHS(msg=False, timeLimit=self.time_limit_s, gapRel=self.gap, gapAbs=1e-6, parallel="off"))
        bound = float(program.solverModel.getInfo().mip_dual_bound)
        if program.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
            return Solution(Status.no_answer, (), np.inf, bound)
        choice = tuple(int(np.argmax([pick.value() for pick in picks[columns]])) for columns in units)
        status = Status.optimal if program.sol_status == pulp.LpSolutionOptimal else Status.feasible
        return Solution(status, choice, problem.objective(choice), bound)


def linear(n_units: int, n_choices: int, n_limits: int, seed: int = 0) -> Problem:
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


def paired(kind: str, n_units: int, n_choices: int, seed: int = 0) -> Problem:
    """Weight widths under a limit of four bits on average, or weight and activation widths under two limits."""
    return _joint(n_units, seed) if kind == "joint" else _gram(n_units, n_choices, seed, kind)


def _gram(n_units: int, n_choices: int, seed: int, kind: str, rank: int = 48) -> Problem:
    rng = np.random.default_rng(seed)
    bits = np.array(BITS)
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
    """With symmetric noise of a quarter of sqrt(P_mm P_nn)."""
    noise = rng.normal(size=pairwise.shape)
    deviation = np.sqrt(np.outer(np.diag(pairwise), np.diag(pairwise)))
    noisy = pairwise + 0.25 * deviation * (noise + noise.T) / 2
    np.fill_diagonal(noisy, np.diag(pairwise))
    return noisy


def _clipped(pairwise: np.ndarray, n_choices: int) -> np.ndarray:
    """Without the entries within units and without negative eigenvalues."""
    unit = np.arange(len(pairwise)) // n_choices
    within = (unit[:, None] == unit) & ~np.eye(len(pairwise), dtype=bool)
    values, vectors = np.linalg.eigh(np.where(within, 0.0, pairwise))
    return (vectors * np.clip(values, 0, None)) @ vectors.T


def _joint(n_units: int, seed: int, rank: int = 96) -> Problem:
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


def scaled(problem: Problem) -> Problem:
    """As `solve` hands it over."""
    return Scaling.of(problem).problem


def timed(problem: Problem, solver: AbstractSolver) -> tuple[float, Solution]:
    """CPU seconds of this process and its children, and what they found."""
    before, children = time.process_time(), sum(os.times()[2:4])
    solution = solver.solve(problem)
    return time.process_time() - before + sum(os.times()[2:4]) - children, solution


def told(timing: tuple[float, Solution] | None, plain: float | None = None) -> str:
    """Seconds, or the share of the plain program's, and the gap where it is left open."""
    if timing is None:
        return "-"
    seconds, solution = timing
    share = f"{seconds:.2f}" if plain is None else f"{seconds / plain:.3f}"
    if solution.status is Status.optimal:
        return share
    return f"{share} (gap {solution.gap:.0e})" if solution.has_plan else f"{share} (no plan)"


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU seconds of the solvers beside a plain 0/1 program.")
    parser.add_argument("--quick", action="store_true", help="a few sizes only")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit of each solver, wall time")
    arguments = parser.parse_args()
    limit = {"time_limit_s": arguments.seconds}
    lines, pairs = QUICK if arguments.quick else (LINEAR, PAIRED)
    timed(scaled(linear(5, 7, 2)), MILP())  # imports
    print("| units x choices, limits | plain, CPU s | Knapsack / plain | MILP / plain |\n|---|---|---|---|")
    for n_units, n_choices, n_limits in lines:
        problem = scaled(linear(n_units, n_choices, n_limits))
        plain = timed(problem, Plain(**limit))
        dynamic = timed(problem, Knapsack()) if n_limits == 1 else None
        program = timed(problem, MILP(**limit))
        ratios = f"{told(dynamic, plain[0])} | {told(program, plain[0])}"
        print(f"| {n_units:,} x {n_choices}, {n_limits} | {told(plain)} | {ratios} |", flush=True)
    print("\n| pairs, units x choices | plain, CPU s | BranchAndBound, CPU s | nodes | LocalSearch, CPU s | and above by |")
    print("|---|---|---|---|---|---|")
    for kind, n_units, n_choices in pairs:
        problem = scaled(paired(kind, n_units, n_choices))
        products = n_units * (n_units - 1) // 2 * n_choices**2
        plain_pairs = timed(problem, Plain(gap=1e-6, **limit)) if products <= MOST_PRODUCTS else None
        tree, search = timed(problem, BranchAndBound(**limit)), timed(problem, LocalSearch(**limit))
        best = min(tree[1].objective, search[1].objective)
        above = (search[1].objective - best) / abs(best)
        print(
            f"| {kind}, {n_units} x {n_choices} | {told(plain_pairs)} | {told(tree)} | {tree[1].nodes:,} "
            f"| {search[0]:.2f} | {above:.2%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
