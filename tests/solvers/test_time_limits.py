"""Time limits: what is refused, and that an answer cut short is a plan with a bound that holds."""

from dataclasses import replace

import numpy as np
import pytest

from mpq_plugins.errors import SolverError
from mpq_plugins.solvers import MILP, Auto, BranchAndBound, Exhaustive, LocalSearch
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Status
from mpq_plugins.solvers.solve import solve

LIMITED = (Auto, BranchAndBound, LocalSearch, MILP)


def _problem(n_units, n_choices, *, paired=True):
    """Random losses that fall and costs that grow with the choice, two limits at the middle; pairs of rank 4."""
    rng = np.random.default_rng(0)
    loss = np.sort(rng.random((n_units, n_choices)))[:, ::-1]
    costs = [np.sort(rng.random((n_units, n_choices))) for _ in range(2)]
    problem = Problem.of(loss, [(cost, (cost[:, 0] + cost[:, -1]).sum() / 2) for cost in costs])
    if not paired:
        return problem
    factors = rng.normal(size=(n_units * n_choices, 4)) * 0.1
    pairs = factors @ factors.T
    for start in range(0, len(pairs), n_choices):
        pairs[start : start + n_choices, start : start + n_choices] = 0
    return replace(problem, pairwise=pairs)


@pytest.mark.parametrize("solver", LIMITED)
@pytest.mark.parametrize("seconds", [0, 0.0, -1, float("nan"), "60"])
def test_limits_that_are_no_time_are_refused(solver, seconds):
    """0, negative and NaN are told when the solver is made, before anything is scored."""
    with pytest.raises(SolverError, match=r"time_limit_s is .*, but must be above 0 seconds"):
        solver(time_limit_s=seconds)
    assert solver(time_limit_s=float("inf")).time_limit_s > 1e9


def _market_split():
    """Sums of random whole numbers that are to be met from both sides: hours of work for any 0/1 program."""
    rng = np.random.default_rng(0)
    tables = [rng.integers(0, 100, (40, 2)).astype(float) for _ in range(3)]
    loss = -tables[0] - tables[1] + rng.random((40, 2))
    return Problem.of(loss, [(table, float(np.floor(table.sum() / 2))) for table in tables])


def _noisy_pairs():
    """50 units whose pairs are mostly noise, far from convex: hours of branching."""
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(200, 200))
    return replace(_problem(50, 4), pairwise=noise + noise.T)


RUN_OVER = [
    (Auto(0.3), _market_split),
    (MILP(0.3), _market_split),
    (MILP(0.3, backend="cbc"), _market_split),
    (MILP(0.05), lambda: _problem(1_500, 20, paired=False)),
    (Auto(0.3), _noisy_pairs),
    (BranchAndBound(0.3), _noisy_pairs),
    (LocalSearch(time_limit_s=0.3, kicks=1_000_000), _noisy_pairs),
]


@pytest.mark.parametrize(("solver", "made"), RUN_OVER, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_what_runs_over_its_limit_is_cut_short(solver, made):
    """Nothing is proven, and the plan meets the limits."""
    problem = made()
    solution = solve(problem, solver)
    assert solution.status is Status.feasible
    assert problem.is_feasible(np.array(solution.choice))
    assert solution.gap > 1e-6


@pytest.mark.parametrize("solver", LIMITED)
def test_next_to_no_time_still_gives_a_plan(solver):
    """In a microsecond the plan keeps the limits, and no plan of the small problem is below the bound."""
    problem = _problem(6, 3, paired=solver is not MILP)
    solution = solve(problem, solver(time_limit_s=1e-6))
    best = solve(problem, Exhaustive()).objective
    assert problem.is_feasible(np.array(solution.choice))
    assert solution.bound <= best + 1e-9
    assert solution.objective >= best - 1e-9


@pytest.mark.parametrize("solver", [BranchAndBound, LocalSearch])
def test_what_would_take_too_long_is_not_begun(solver, monkeypatch):
    """On 1,200 columns the dense algebra of a bound takes seconds: with no time left nothing of it is called."""
    monkeypatch.setattr("mpq_plugins.solvers.tree.convex", lambda *_: pytest.fail("a bound was begun"))
    monkeypatch.setattr("mpq_plugins.solvers.iterated_search._neighbours", lambda *_: pytest.fail("neighbours were listed"))
    problem = _problem(200, 6)
    solution = solve(problem, solver(time_limit_s=0.001))
    assert solution.status is Status.feasible
    assert np.isfinite(solution.bound)
    assert solution.bound <= solution.objective
