"""The published relaxation and its two roundings, by hand."""

from dataclasses import replace

import pytest
from papers import PublishedRounding

from mpq_plugins import Problem, Status, solve
from mpq_plugins.errors import SolverError
from mpq_plugins.solvers import Auto


def published(importance, sizes, limit, widths=(2, 3, 4)):
    """max sum importance x bits subject to sum sizes x bits <= limit."""
    problem = Problem.of(
        [[-c * b for b in widths] for c in importance], [([[p * b for b in widths] for p in sizes], float(limit))]
    )
    return replace(problem, choices=tuple(f"w{b}a8" for _ in importance for b in widths))


# Per cost, unit 0 is worth 3, unit 1 is worth 2, unit 2 is worth 1: bits go to unit 0, then unit 1, then unit 2.
IMPORTANCE, SIZES = [3.0, 4.0, 1.0], [1.0, 2.0, 1.0]


def test_fill_rounds_the_last_width_down():
    """Limit 13.2: unit 0 takes 4, unit 1 3.6, unit 2 stays at 2; filling rounds 3.6 down. Bound -(12 + 14.4 + 2)."""
    solution = solve(published(IMPORTANCE, SIZES, 13.2), PublishedRounding())
    assert solution.choice == (2, 1, 0)
    assert solution.bound == pytest.approx(-28.4)
    assert solution.status is Status.feasible
    assert solution.shadow_prices == pytest.approx((2.0,))


def test_the_exact_answer_is_better():
    """The budget that rounding leaves holds one more bit of unit 2: the 0/1 optimum has it, the rounding has not."""
    problem = published(IMPORTANCE, SIZES, 13.2)
    assert solve(problem, Auto()).objective == pytest.approx(-27.0)
    assert solve(problem, PublishedRounding()).objective == pytest.approx(-26.0)


def test_nearest_overshoots_and_says_so():
    """3.6 rounds to 4, which costs 14 of 13.2: not an answer, neither thrown nor returned as one."""
    problem = published(IMPORTANCE, SIZES, 13.2)
    with pytest.raises(SolverError, match=r"106\.06.*repair=True"):
        solve(problem, PublishedRounding(rounding="nearest"))
    kept = solve(problem, PublishedRounding(rounding="nearest"), throw=False)
    assert (kept.status, kept.choice, kept.has_plan) == (Status.over_budget, (2, 2, 0), False)
    assert kept.unused == pytest.approx((-0.8,))


def test_repair_meets_the_limit():
    """Repair lowers the width that loses least per cost, then fills what is left."""
    solution = solve(published(IMPORTANCE, SIZES, 13.2), PublishedRounding(rounding="nearest", repair=True))
    assert solution.status is Status.feasible
    assert solution.objective == pytest.approx(-27.0)


def test_halves_go_to_the_even_width():
    """Limit 13: unit 1 is at 3.5 and goes to 4 as numpy.around would send it; at limit 11 its 2.5 goes to 2."""
    above = solve(published(IMPORTANCE, SIZES, 13.0), PublishedRounding(rounding="nearest"), throw=False)
    below = solve(published(IMPORTANCE, SIZES, 11.0), PublishedRounding(rounding="nearest"), throw=False)
    assert (above.choice, below.choice) == ((2, 2, 0), (2, 0, 0))


def test_equal_worth_fills_units_in_order():
    """With one worth for all units (the constant control) the corner of the relaxation fills in unit order."""
    solution = solve(published([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], 8.0), PublishedRounding())
    assert solution.choice == (2, 0, 0)


def test_forms_that_were_not_published_are_refused():
    """Several limits, unnamed choices and mixed activation bits have no published rounding."""
    problem = published(IMPORTANCE, SIZES, 13.2)
    with pytest.raises(SolverError, match="2 limits"):
        solve(replace(problem, limits=problem.limits * 2), PublishedRounding())
    with pytest.raises(SolverError, match="rounds bit-widths"):
        solve(replace(problem, choices=tuple("123456789")), PublishedRounding())
    with pytest.raises(SolverError, match="weight bits alone"):
        solve(replace(problem, choices=("w2a4", "w2a8", "w4a8") * 3), PublishedRounding())
