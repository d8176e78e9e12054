"""Pairwise losses: every quadratic solver against enumeration, bounds against scipy, and honest statuses."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from problems import random_problem
from scipy.optimize import minimize

from mpq_plugins import Problem, Status, solve
from mpq_plugins.errors import SolverError
from mpq_plugins.solvers import MILP, Auto, BranchAndBound, Exhaustive, LocalSearch
from mpq_plugins.solvers.convex import Simplices, convex
from mpq_plugins.solvers.curvature import best_blocks
from mpq_plugins.solvers.quadratic import Quadratic
from mpq_plugins.solvers.relaxation import Relaxed
from mpq_plugins.solvers.scaling import Scaling

KINDS = ("gram", "indefinite", "ties", "zero", "pairs only")


def random_quadratic(seed, n_limits):
    """A random problem (groups, single choices, duplicates, all sizes of losses) with a pairwise loss of one of the kinds."""
    problem = random_problem(seed, n_limits)
    rng, n = np.random.default_rng([seed, 99]), len(problem.loss)
    scale = float(np.ptp(problem.loss)) or 1.0
    kind = KINDS[seed % len(KINDS)]
    if kind == "gram":
        changes = rng.normal(size=(n, max(2, n // 2)))
    elif kind == "ties":
        changes = rng.integers(-1, 2, (n, 3)).astype(float)
    else:
        changes = rng.normal(size=(n, n))
    pairwise = changes + changes.T if kind in ("indefinite", "pairs only") else changes @ changes.T
    if kind == "pairs only":
        pairwise[problem.unit_of[:, None] == problem.unit_of] = 0.0
    return replace(problem, pairwise=scale * (0.0 if kind == "zero" else 1.0) * pairwise)


def gram(n_units, n_choices, seed, noise=0.0):
    """Logit changes that halve with every bit and share a direction; sizes of layers; four bits on average."""
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 8][-n_choices:])
    direction = 0.6 * rng.normal(size=48) + 0.8 * rng.normal(size=(n_units, 1, 48))
    changes = np.exp(rng.normal(0, 0.7, (n_units, 1, 1))) * 2.0 ** -bits[:, None]
    changes = changes * (direction + rng.normal(size=(n_units, n_choices, 48)))
    flat = changes.reshape(-1, 48)
    deviation = np.linalg.norm(flat, axis=1)
    error = rng.normal(size=(len(flat), len(flat)))
    pairwise = flat @ flat.T + noise * np.outer(deviation, deviation) * (error + error.T)
    size = np.exp(rng.normal(0, 1, n_units)).round(3)[:, None] * bits
    problem = Problem.of(np.zeros((n_units, n_choices)), [(size, float(4 * (size[:, 0] / bits[0]).sum()))])
    return replace(problem, pairwise=pairwise)


def tolerance(problem, optimum):
    return 1e-6 * abs(optimum) + 1e-9 * (float(np.ptp(problem.loss)) or 1.0)


@pytest.mark.parametrize(
    ("solver", "seeds"),
    [
        (BranchAndBound(kicks=1), range(70)),
        (LocalSearch(kicks=5), range(15)),
        (Auto(), range(15)),
    ],
    ids=["branch-and-bound", "local-search", "auto"],
)
@pytest.mark.parametrize("n_limits", range(3))
def test_every_quadratic_solver_agrees_with_enumeration(solver, seeds, n_limits):
    """Plans are feasible, bounds below the optimum, and what is called optimal is: on 210 instances for branch and bound."""
    n_proven = n_plans = 0
    for seed in seeds:
        problem = random_quadratic(seed, n_limits)
        expected = solve(problem, Exhaustive(), throw=False, n_next=0)
        found = solve(problem, solver, throw=False, n_next=0)
        assert found.has_plan == expected.has_plan, seed
        if not expected.has_plan:
            assert found.status is Status.infeasible, seed
            continue
        n_plans += 1
        near = tolerance(problem, expected.objective)
        assert problem.is_feasible(found.choice)
        assert found.objective == pytest.approx(problem.objective(found.choice))
        assert found.bound <= expected.objective + near, seed
        assert found.objective >= expected.objective - near, seed
        if found.status is Status.optimal:
            n_proven += 1
            assert found.objective == pytest.approx(expected.objective, abs=near), seed
    assert n_proven == 0 if isinstance(solver, LocalSearch) else n_proven >= 0.95 * n_plans


def test_the_reference_is_the_definition():
    """The exhaustive search finds the least of loss'x + x'Px / 2, summed in plain loops over every plan."""
    for seed in range(6):
        problem = random_quadratic(seed, 1)
        plans = []
        for choice in itertools.product(*(range(size) for size in np.diff(problem.start))):
            columns = [int(first) + index for first, index in zip(problem.start, choice, strict=False)]
            pairs = sum(problem.pairwise[m, n] for m in columns for n in columns)
            if problem.is_feasible(choice):
                plans.append(sum(problem.loss[m] for m in columns) + pairs / 2)
        solution = solve(problem, Exhaustive(), throw=False)
        if plans:
            assert solution.objective == pytest.approx(min(plans), rel=1e-9)


@pytest.mark.parametrize("solver", [Auto(), BranchAndBound(), LocalSearch()], ids=repr)
def test_errors_that_cancel_by_hand(solver):
    """Two units whose low widths hurt alone (1 each) but cancel together (-3): both go low, loss 1 + 1 - 3 = -1."""
    pairwise = np.zeros((4, 4))
    pairwise[0, 0] = pairwise[2, 2] = 2.0  # x'Px / 2 counts half: 1 each
    pairwise[0, 2] = pairwise[2, 0] = -3.0  # counted from both sides: -3 for the pair
    problem = replace(Problem.of([[0.0, 0.0], [0.0, 0.0]], [([[1.0, 2.0], [1.0, 2.0]], 4.0)]), pairwise=pairwise)
    solution = solve(problem, solver)
    assert solution.choice == (0, 0)
    assert solution.objective == pytest.approx(-1.0)
    assert solution.bound <= -1.0 + 1e-9


@pytest.mark.parametrize("solver", [Auto(), BranchAndBound(), LocalSearch()], ids=repr)
def test_linked_units_move_together(solver):
    """Two units that read one quantized activation both want label 8, which costs too much; a third unit is free to pay."""
    problem = Problem.of(
        [[3.0, 0.0], [3.0, 0.0], [0.0, 1.0]],
        [([[1.0, 4.0], [1.0, 4.0], [6.0, 1.0]], 9.0)],
        cluster=[0, 0, 1],
        width=[[4, 8], [4, 8], [4, 8]],
    )
    pairwise = np.zeros((6, 6))
    pairwise[1, 4] = pairwise[4, 1] = 0.5
    solution = solve(replace(problem, pairwise=pairwise), solver)
    assert solution.choice == (1, 1, 1)
    assert solution.objective == pytest.approx(1.0)


@pytest.mark.parametrize("tightened", [False, True])
def test_the_convex_form_equals_the_loss_on_every_plan(tightened):
    """Whatever curvature is moved within units, no plan changes its loss, and no direction along the simplices bends down."""
    for seed in range(10):
        problem = random_quadratic(seed, 1)
        quadratic = Quadratic.of(problem)
        simplices = Simplices.of(quadratic)
        blocks = best_blocks(quadratic, quadratic.loss, iterations=30, deadline=np.inf) if tightened else None
        form = convex(quadratic, simplices, blocks)
        rng = np.random.default_rng(seed)
        for _ in range(5):
            taken = quadratic.attaining(rng.random(len(quadratic.columns)))
            x = np.zeros(len(quadratic.columns))
            x[taken] = 1.0
            value = form.linear @ x + x @ form.hessian @ x / 2
            scale = np.abs(form.hessian).max() + np.abs(problem.loss).max()
            assert value == pytest.approx(problem.objective(quadratic.choice(taken)), abs=1e-9 * scale)
        curvature = simplices.basis.T @ form.hessian @ simplices.basis
        assert np.linalg.eigvalsh(curvature).min(initial=0.0) >= -1e-9 * np.abs(form.hessian).max()


def test_the_relaxation_is_that_of_another_solver():
    """The bound of the root comes up to the minimum that scipy finds on the simplices, and is never above it."""
    for seed in range(4):
        problem = Scaling.of(gram(5, 3, seed)).problem
        quadratic = Quadratic.of(problem)
        simplices = Simplices.of(quadratic)
        form = convex(quadratic, simplices)
        relaxed = Relaxed.of(quadratic, form, simplices, 4.0)
        nodes = relaxed.start()
        bounds = []
        for _ in range(40):
            relaxed.iterate(nodes, 25)
            bounds.append(float(relaxed.bounds(nodes).value[0]))
        n = len(form.linear)
        one = (problem.unit_of[None] == np.arange(problem.n_units)[:, None]).astype(float)
        found = minimize(
            lambda x, form=form: form.linear @ x + x @ form.hessian @ x / 2,
            np.full(n, 1 / 3),
            jac=lambda x, form=form: form.linear + form.hessian @ x,
            bounds=[(0, 1)] * n,
            constraints=[
                {"type": "eq", "fun": lambda x, one=one: one @ x - 1, "jac": lambda x, one=one: one},
                {"type": "ineq", "fun": lambda x, q=quadratic: q.limits - q.cost @ x, "jac": lambda x, q=quadratic: -q.cost},
            ],
            method="SLSQP",
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert max(bounds) <= found.fun * (1 + 1e-6)
        assert max(bounds) == pytest.approx(found.fun, rel=1e-3)


@pytest.mark.parametrize(("n_units", "n_choices"), [(50, 4), (72, 3), (100, 3)])
def test_gram_problems_of_real_sizes_are_proven(n_units, n_choices):
    """The optimum of Gram matrices is proven within 1e-6, and no plan of a long local search is better."""
    problem = gram(n_units, n_choices, seed=1)
    solution = solve(problem, BranchAndBound(time_limit_s=300), n_next=0)
    assert solution.status is Status.optimal
    assert solution.gap <= 1e-6
    assert problem.is_feasible(solution.choice)
    assert solution.objective <= solve(problem, LocalSearch(seed=5, kicks=10), n_next=0).objective * (1 + 1e-6)


@pytest.mark.parametrize("solver", [BranchAndBound(0.2, kicks=2), Auto(0.2)], ids=str)
def test_a_time_limit_is_feasible_with_a_gap(solver):
    """A noisy problem cut off early is feasible, never optimal, and its bound is below the best plan known."""
    problem = gram(50, 4, seed=0, noise=0.5)
    cut = solve(problem, solver, n_next=0)
    assert cut.status is Status.feasible
    assert cut.gap > 1e-3
    assert cut.bound <= solve(problem, LocalSearch(time_limit_s=0.5), n_next=0).objective
    assert "allow more time" in cut.advice


def test_next_best_plans_hold_every_neighbour_that_is_better():
    """49 other plans, distinct, feasible and in order; the first is no worse than any plan one or two changes away."""
    problem = gram(8, 3, seed=2)
    solution = solve(problem, BranchAndBound(), n_next=49)
    plans = [plan.choice for plan in solution.next_best]
    assert len({solution.choice, *plans}) == 50
    assert all(problem.is_feasible(plan) for plan in plans)
    losses = [plan.objective for plan in solution.next_best]
    assert losses == sorted(losses)
    assert losses == pytest.approx([problem.objective(plan) for plan in plans])
    neighbours = []
    for units in itertools.combinations(range(8), 2):
        for pair in itertools.product(range(3), repeat=2):
            other = list(solution.choice)
            other[units[0]], other[units[1]] = pair
            if tuple(other) != solution.choice and problem.is_feasible(other):
                neighbours.append(problem.objective(other))
    assert losses[0] <= min(neighbours) + 1e-12
    assert losses[0] == pytest.approx(solve(problem, Exhaustive(), n_next=49).next_best[0].objective)


@pytest.mark.parametrize("n_limits", [1, 2])
def test_many_next_best_plans_of_linear_problems(n_limits):
    """49 distinct feasible plans come for linear losses too, in order of loss and none better than the optimum."""
    rng = np.random.default_rng(n_limits)
    costs = [(rng.random((40, 4)), 16.0) for _ in range(n_limits)]
    problem = Problem.of(rng.random((40, 4)), costs)
    solution = solve(problem, n_next=49)
    losses = [plan.objective for plan in solution.next_best]
    assert len({solution.choice, *(plan.choice for plan in solution.next_best)}) == 50
    assert all(problem.is_feasible(plan.choice) for plan in solution.next_best)
    assert losses == sorted(losses)
    assert losses[0] >= solution.objective


@pytest.mark.parametrize("factor", [1e-15, 1e-6, 1e9])
def test_the_size_of_pairwise_losses_changes_no_plan(factor):
    """Losses of 1e-15 and of 1e9 give the plan of ordinary numbers, with the gap still proven."""
    problem = gram(12, 4, seed=3)
    scaled = replace(problem, pairwise=problem.pairwise * factor)
    assert solve(scaled).choice == solve(problem).choice
    assert solve(scaled).status is Status.optimal


def test_terms_that_cancel_prove_nothing():
    """Pairs of 1e15 against losses of -1e15 leave differences near 1 below the rounding: feasible at best, never optimal."""
    rng = np.random.default_rng(0)
    problem = Problem.of(rng.random((8, 4)) - 3.5e15)
    pairwise = 1e15 + rng.random((32, 32))
    np.fill_diagonal(pairwise, 0.0)
    for solver in (BranchAndBound(2.0, kicks=2), LocalSearch(kicks=2), Auto(2.0)):
        assert solve(replace(problem, pairwise=(pairwise + pairwise.T) / 2), solver).status is Status.feasible


def test_shadow_prices_are_those_of_the_relaxation():
    """A limit that binds has a positive price, one that does not has none."""
    problem = gram(12, 4, seed=4)
    limit = problem.limits[0]
    loose = replace(limit, name="loose", limit=100 * limit.limit)
    prices = solve(replace(problem, limits=(limit, loose)), BranchAndBound()).shadow_prices
    assert prices[0] > 0
    assert prices[1] == pytest.approx(0.0, abs=1e-9 * prices[0])


def test_auto_says_what_it_picked_and_why():
    """Few plans are tried, pairs are searched, no pairs solved as linear."""
    picked = {
        "exhaustive": gram(4, 4, 0),
        "branch-and-bound": gram(12, 4, 0),
        "no unit interacts": replace(gram(12, 4, 0), pairwise=np.eye(48)),
    }
    for reason, problem in picked.items():
        assert reason in solve(problem, n_next=0).solver


def test_a_table_without_pairs_is_the_linear_problem():
    """P of a diagonal alone adds half of it to every choice: the answer is that of the 0/1 program with those losses."""
    problem = replace(gram(12, 4, 0), pairwise=np.diag(np.arange(48.0)))
    linear = replace(problem, loss=problem.loss + np.arange(48.0) / 2, pairwise=None)
    assert solve(problem).choice == solve(linear, MILP()).choice
    assert solve(problem).objective == pytest.approx(solve(linear).objective)


def test_tables_that_are_no_pairwise_losses_are_refused():
    """A wrong shape, a NaN and an asymmetric table are errors that say so, before any solver runs."""
    problem = gram(3, 4, 0)
    with pytest.raises(SolverError, match=r"shape \(3, 3\) for 12 choices"):
        solve(replace(problem, pairwise=np.eye(3)))
    with pytest.raises(SolverError, match="not finite"):
        solve(replace(problem, pairwise=np.full((12, 12), np.nan)))
    with pytest.raises(SolverError, match=r"not symmetric.*table\.T"):
        solve(replace(problem, pairwise=np.triu(problem.pairwise)))


def test_equal_seeds_give_equal_answers():
    """The whole solution repeats, next-best plans included."""
    problem = gram(14, 4, 5)
    for solver in (BranchAndBound(), LocalSearch(seed=3)):
        first, second = (replace(solve(problem, solver, n_next=20), seconds=0.0) for _ in range(2))
        assert first == second


def test_one_unit_and_one_choice():
    """Nothing to decide, or one unit alone, is answered by every quadratic solver."""
    one = replace(Problem.of([[3.0]], [([[2.0]], 2.0)]), pairwise=np.array([[4.0]]))
    alone = replace(Problem.of([[3.0, 2.0]]), pairwise=np.array([[4.0, 1.0], [1.0, 8.0]]))
    for solver in (Auto(), BranchAndBound(), LocalSearch()):
        assert solve(one, solver).objective == 5.0
        assert solve(alone, solver).choice == (0,)
