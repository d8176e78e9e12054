"""What `solve` adds around a solver: refusals, checks of the answer, honest statuses, the certificate's fields."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from mpq_plugins import AbstractSolver, Problem, Solution, Status, solve
from mpq_plugins.errors import InfeasibleBudgetError, SolverError
from mpq_plugins.solvers import MILP, Auto, Exhaustive, Knapsack

# Two units: 0 costs 1 or 4 and loses 5 or 1; 1 costs 2 or 3 and loses 3 or 2.
LOSS = [[5.0, 1.0], [3.0, 2.0]]
COST = [[1.0, 4.0], [2.0, 3.0]]


@dataclass(frozen=True)
class Says(AbstractSolver):
    """Returns one answer, true or not."""

    name = "says"
    choice: tuple[int, ...]
    status: Status = Status.optimal
    bound: float = -np.inf

    def solve(self, problem):
        return Solution(self.status, self.choice, -123.0, self.bound)


def test_the_certificate_by_hand():
    """Within 6, unit 0 takes the dear choice: loss 1 + 3, usage 6; the relaxation prices a unit of cost at 4 / 3 or 1."""
    solution = solve(Problem.of(LOSS, [(COST, 6.5)]))
    assert solution.choice == (1, 0)
    assert (solution.objective, solution.usage, solution.unused) == (4.0, (6.0,), (0.5,))
    assert solution.shadow_prices == pytest.approx((1.0,))  # the next step is unit 1: loss 1 for cost 1
    assert [plan.choice for plan in solution.next_best] == [(0, 1), (0, 0)]
    assert [plan.objective for plan in solution.next_best] == [7.0, 8.0]
    assert solution.status is Status.optimal
    assert solution.gap < 1e-9


def test_no_limit_takes_the_least_loss():
    """Without limits every unit takes its least loss, and there is nothing to price."""
    solution = solve(Problem.of(LOSS))
    assert (solution.choice, solution.shadow_prices, solution.usage) == ((1, 1), (), ())


def test_a_limit_below_the_least_is_refused_with_the_least():
    """The text names the limit, the least that can be reached, and the units that hold most of it."""
    with pytest.raises(InfeasibleBudgetError, match=r"cost0 <= 2 cannot be met: the least is 3.*unit1 \(2\)"):
        solve(Problem.of(LOSS, [(COST, 2.0)]))


def test_limits_that_exclude_each_other_are_refused_with_the_least_of_each():
    """Each limit can be met alone; the text says how far each would have to give way."""
    opposite = [[4.0, 1.0], [3.0, 2.0]]
    problem = Problem.of(LOSS, [(COST, 4.0), (opposite, 5.0)])
    with pytest.raises(InfeasibleBudgetError, match=r"together.*least cost0 is 6; the least cost1 is 6"):
        solve(problem)
    assert solve(problem, throw=False).status is Status.infeasible


def test_linked_units_agree_even_when_it_costs():
    """Two units that read one quantized activation take one label, though the best of each has another."""
    problem = Problem.of([[0.0, 5.0], [5.0, 1.0]], cluster=[7, 7], width=[[4, 8], [4, 8]])
    for solver in (Auto(), MILP(), Exhaustive()):
        assert solve(problem, solver).choice == (0, 0)


def test_units_without_a_common_label_are_refused():
    """A group whose units share no activation bits has no plan, and the text says so."""
    with pytest.raises(InfeasibleBudgetError, match="no activation bits in common"):
        solve(Problem.of([[0.0], [1.0]], cluster=[0, 0], width=[[4], [8]]))


@pytest.mark.parametrize(
    ("choice", "text"), [((1, 1), "breaks a limit: cost0 7 > 6"), ((0, 2), "not one choice for each"), ((0,), "not one choice")]
)
def test_an_answer_that_the_tables_contradict_is_an_error(choice, text):
    """A solver that claims an optimum over the limit, or a choice that does not exist, is not believed."""
    with pytest.raises(SolverError, match=text):
        solve(Problem.of(LOSS, [(COST, 6.0)]), Says(choice))


def test_a_group_that_disagrees_is_an_error():
    """A solver that ignores the groups is not believed."""
    problem = Problem.of(LOSS, cluster=[0, 0], width=[[4, 8], [4, 8]])
    with pytest.raises(SolverError, match="different activation bits"):
        solve(problem, Says((0, 1)))


def test_objective_and_gap_are_recomputed():
    """A wrong objective, and the claim of an optimum that is none, do not survive: the gap is that of the relaxation."""
    solution = solve(Problem.of(LOSS, [(COST, 6.0)]), Says((0, 0)))
    assert solution.objective == 8.0
    assert solution.bound <= 4.0
    assert solution.status is Status.feasible


@pytest.fixture(scope="module")
def hard_problem():
    """Market-split rows, equal sums of random whole numbers: branch and bound is known to be slow on them."""
    rng = np.random.default_rng(0)
    tables = [rng.integers(0, 100, (40, 2)).astype(float) for _ in range(3)]
    loss = -tables[0] - tables[1] + rng.random((40, 2))
    problem = Problem.of(loss, [(table, float(np.floor(table.sum() / 2))) for table in tables])
    return problem, solve(problem, MILP(time_limit_s=20, backend="highs"), throw=False, n_next=0)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_a_time_limit_never_reads_as_optimal(hard_problem, backend):
    """A hard problem cut off at once is feasible or unanswered, and its bound stays below the best plan known."""
    problem, full = hard_problem
    cut = solve(problem, MILP(time_limit_s=0.02, backend=backend), throw=False, n_next=0)
    assert cut.status in (Status.feasible, Status.no_answer)
    assert cut.bound <= full.objective
    if cut.has_plan:
        assert full.objective <= cut.objective
        assert cut.gap > 1e-9
        assert "allow more time" in cut.advice


@pytest.mark.parametrize("factor", [1e-15, 1e-9, 1.0, 1e12])
def test_the_size_of_losses_and_costs_changes_no_plan(factor):
    """Scores of 1e-15 and costs of 1e12 give the plan of ordinary numbers: nothing drowns in absolute tolerances."""
    rng = np.random.default_rng(3)
    loss, cost = rng.random((12, 4)), rng.integers(1, 100, (12, 4)).astype(float)
    plans = [
        solve(Problem.of(loss * scale, [(cost / scale, 600.0 / scale), (cost[::-1] / scale, 600.0 / scale)]), MILP())
        for scale in (1.0, factor)
    ]
    assert plans[0].choice == plans[1].choice
    assert plans[1].shadow_prices == pytest.approx([price * factor**2 for price in plans[0].shadow_prices], rel=1e-5)


def test_one_large_loss_does_not_hide_the_small_ones():
    """Units that decide over 1e-6 are still optimal beside a unit that decides over 1e6."""
    rng = np.random.default_rng(5)
    loss = np.concatenate([[[0.0, 1e6]], rng.random((9, 2)) * 1e-6])
    cost = np.concatenate([[[0.0, 1.0]], rng.random((9, 2))])
    problem = Problem.of(loss, [(cost, 4.0), (cost**2, 3.0)])
    assert solve(problem, MILP()).choice == solve(problem, Exhaustive()).choice


def test_same_problem_same_answer():
    """Equal losses and costs everywhere: the answer is the same each time, next-best plans included."""
    problem = Problem.of(np.ones((6, 3)), [(np.tile([1.0, 2.0, 3.0], (6, 1)), 12.0)])
    for solver in (Auto(), MILP(), Exhaustive()):
        first, second = (replace(solve(problem, solver), seconds=0.0) for _ in range(2))
        assert first == second


def test_values_that_are_not_finite_are_refused():
    """A NaN in the losses or costs is an error before any solver runs."""
    with pytest.raises(SolverError, match="not finite"):
        solve(Problem.of([[np.nan, 1.0]]))
    with pytest.raises(SolverError, match="cost0"):
        solve(Problem.of(LOSS, [([[1.0, np.inf], [1.0, 2.0]], 3.0)]))


def test_nothing_to_decide():
    """No units is an empty optimal plan; one unit with one choice is that choice."""
    assert solve(Problem.of([])).status is Status.optimal
    assert solve(Problem.of([[3.0]], [([[2.0]], 2.0)])).choice == (0,)


def test_each_solver_refuses_what_it_cannot_do():
    """Several limits and linked units for the knapsack, pairs for a linear solver, too many plans: clear errors."""
    two = Problem.of(LOSS, [(COST, 6.0), (COST, 6.0)])
    with pytest.raises(SolverError, match=r"one limit.*MILP\(\)"):
        solve(two, Knapsack())
    with pytest.raises(SolverError, match=r"must agree.*MILP\(\)"):
        solve(Problem.of(LOSS, cluster=[0, 0], width=[[4, 8], [4, 8]]), Knapsack())
    pairs = replace(two, pairwise=np.zeros((4, 4)))
    with pytest.raises(SolverError, match=r"no pairwise losses.*BranchAndBound\(\)"):
        solve(pairs, MILP())
    with pytest.raises(SolverError, match="more than most_plans"):
        solve(Problem.of(np.ones((30, 2))), Exhaustive())


def test_exhaustive_counts_pairs():
    """x'Px / 2 with P coupling the two cheap choices by 10: taking both is no longer the best."""
    pairwise = np.zeros((4, 4))
    pairwise[1, 3] = pairwise[3, 1] = 10.0
    solution = solve(replace(Problem.of(LOSS), pairwise=pairwise), Exhaustive())
    assert (solution.choice, solution.objective) == ((1, 0), 4.0)


def test_a_large_knapsack_is_proven():
    """2,000 units of 7 widths: the gap is proven, the plan is within the limit and close to using it up."""
    rng = np.random.default_rng(1)
    cost = np.exp(rng.normal(8, 1.5, 2000)).round()[:, None] * np.arange(2, 9)
    loss = np.exp(rng.normal(0, 1.5, 2000))[:, None] * 4.0 ** -np.arange(2, 9)
    solution = solve(Problem.of(loss, [(cost, float(cost[:, 2].sum()))]), Knapsack(gap=1e-6))
    assert solution.status is Status.optimal
    assert solution.gap <= 1e-6
    assert 0 <= solution.unused[0] < 1e-4 * solution.usage[0]


def test_too_few_states_are_told():
    """A dynamic program without room reports a gap instead of an optimum, and the truth lies within it."""
    rng = np.random.default_rng(2)
    problem = Problem.of(rng.random((40, 7)), [(rng.random((40, 7)), 12.0)])
    exact = solve(problem, MILP())
    short = solve(problem, Knapsack(max_states=2), n_next=0)
    assert short.bound <= exact.objective * (1 + 1e-12)
    assert short.objective >= exact.objective * (1 - 1e-12)
    assert solve(problem, Auto()).objective == pytest.approx(exact.objective, rel=1e-9)
