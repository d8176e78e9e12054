"""Bounds, prices and rankings against trying every plan; the optimum itself is in tests/test_contracts.py."""

import numpy as np
import pytest
from problems import linear_relaxation, random_problem, with_limit

from mpq_plugins import solve
from mpq_plugins.solvers import MILP, Auto, Exhaustive, Knapsack
from mpq_plugins.solvers.blocks import Blocks
from mpq_plugins.solvers.lagrangian import relax
from mpq_plugins.solvers.scaling import Scaling

SEEDS = range(72)  # times 0..3 limits: 288 problems


def scale_of(problem):
    return float(np.ptp(problem.loss)) or 1.0


@pytest.mark.parametrize("n_limits", range(1, 4))
def test_the_relaxation_is_a_lower_bound_and_equals_an_independent_one(n_limits):
    """Our Lagrangian bound is the value of scipy's linear program, and never above the 0/1 optimum."""
    for seed in SEEDS:
        problem = random_problem(seed, n_limits)
        optimum = solve(problem, Exhaustive(), throw=False, n_next=0)
        if not optimum.has_plan:
            continue
        scaling = Scaling.of(problem)
        bound = scaling.loss(relax(Blocks.of(scaling.problem)).value)
        assert bound <= optimum.objective + 1e-9 * scale_of(problem), seed
        assert bound == pytest.approx(linear_relaxation(problem), rel=1e-6, abs=1e-6 * scale_of(problem)), seed


@pytest.mark.parametrize("n_limits", range(1, 4))
def test_shadow_prices_are_slopes_of_the_relaxation(n_limits):
    """The loss saved per unit of a limit lies between scipy's one-sided differences, and is never negative."""
    checked = 0
    for seed in SEEDS[:40]:
        problem = random_problem(seed, n_limits)
        solution = solve(problem, throw=False, n_next=0)
        if not solution.has_plan:
            continue
        for row, (price, limit) in enumerate(zip(solution.shadow_prices, problem.limits, strict=True)):
            step = 1e-4 * abs(limit.limit)
            here = linear_relaxation(problem)
            more = (here - linear_relaxation(with_limit(problem, row, limit.limit + step))) / step
            less = (linear_relaxation(with_limit(problem, row, limit.limit - step)) - here) / step
            slack = 1e-4 * scale_of(problem) / abs(limit.limit)
            assert price >= 0
            assert more - slack <= price <= less + slack, (seed, row)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("solver", [Auto(), Knapsack(), MILP()], ids=repr)
@pytest.mark.parametrize("n_limits", range(3))
def test_next_best_plans_are_the_exhaustive_ranking(solver, n_limits):
    """The losses of the three plans after the optimum are those of the exhaustive ranking, each plan new and feasible."""
    if isinstance(solver, Knapsack) and n_limits > 1:
        pytest.skip("takes one limit")
    for seed in SEEDS[:24]:
        problem = random_problem(seed, n_limits)
        if isinstance(solver, Knapsack) and problem.is_linked:
            continue
        expected = solve(problem, Exhaustive(), throw=False)
        if not expected.has_plan:
            continue
        found = solve(problem, solver)
        losses = [plan.objective for plan in found.next_best]
        assert losses == pytest.approx([p.objective for p in expected.next_best], abs=1e-9 * scale_of(problem)), seed
        assert len({found.choice, *(plan.choice for plan in found.next_best)}) == 1 + len(found.next_best)
        assert all(problem.is_feasible(plan.choice) for plan in found.next_best)
