"""From scores and budgets to tables: hand-worked numbers."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from mpq_plugins import AbstractCost, Budget, Inventory, Layer, Precision, Problem, Scores, Space, build_problem
from mpq_plugins.costs import WeightSize
from mpq_plugins.errors import BudgetError, InfeasibleBudgetError
from mpq_plugins.solvers.problem import check_reachable

CHOICES = tuple(Precision.parse(text) for text in ("w2a4", "w4a4", "w8a8"))


@dataclass(frozen=True)
class Peak(AbstractCost):
    """The largest activation, in bits."""

    name = "peak"
    unit = "bit"
    reduce = "max"

    def of(self, layer, precision):
        return layer.n_input_elements * precision.activation


def layer(name, n_weights, n_inputs=10):
    return Layer(
        name=name,
        kind="Linear",
        weight_name=f"{name}.weight",
        weight_shape=(n_weights,),
        n_weights=n_weights,
        n_biases=0,
        n_norm_parameters=0,
        out_channels=1,
        groups=1,
        macs=n_weights,
        n_calls=1,
        input_shape=(n_inputs,),
        output_shape=(1,),
        n_input_elements=n_inputs,
        n_output_elements=1,
    )


def scores(*, tie=(), share=()):
    """Layers a, b, c of 8, 16 and 80 weights; the loss of choice k of unit u is 10 u + k."""
    inventory = Inventory((layer("a", 8), layer("b", 16, 20), layer("c", 80)), (), "sha256:x")
    space = Space.build(inventory, CHOICES, tie=tie, share_activations=share)
    losses = tuple(tuple(10.0 * u + k for k in range(3)) for u in range(len(space.units)))
    return Scores(space, losses, {"name": "hand"})


def test_tables_of_a_size_budget():
    """Bytes are weights x bits / 8: a 2, 4, 8; b 4, 8, 16; c 20, 40, 80. Names and labels follow the choices."""
    problem = build_problem(scores(), [Budget(WeightSize(), 50)])
    assert problem.limits[0].cost.tolist() == [2, 4, 8, 4, 8, 16, 20, 40, 80]
    assert problem.limits[0].limit == 50.0
    assert problem.choices == ("w2a4", "w4a4", "w8a8") * 3
    assert problem.width.tolist() == [4, 4, 8] * 3
    assert problem.loss.tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert problem.usage((0, 1, 2)) == (90.0,)
    assert not problem.is_feasible((0, 1, 2))
    assert problem.is_feasible((2, 1, 0))


def test_tied_layers_pay_together():
    """A unit of a and c costs the sum of both at each precision."""
    problem = build_problem(scores(tie=[("a", "c")]), [Budget(WeightSize(), 500)])
    assert problem.units == ("a+c", "b")
    assert problem.limits[0].cost.tolist() == [22, 44, 88, 4, 8, 16]


def test_a_peak_budget_drops_choices():
    """Of b's 20 inputs, 8 bits make 160, above 100: b loses w8a8 and the others keep it; the peak is no limit row."""
    problem = build_problem(scores(), [Budget(Peak(), 100), Budget(WeightSize(), 500)])
    assert problem.start.tolist() == [0, 3, 5, 8]
    assert [limit.name for limit in problem.limits] == ["size"]
    assert problem.limits[0].cost.tolist() == [2, 4, 8, 4, 8, 20, 40, 80]


def test_pairwise_losses_follow_the_dropped_choices():
    """Rows and columns of a dropped choice leave the pairwise table."""
    table = np.add.outer(np.arange(9.0), np.arange(9.0))
    problem = build_problem(replace(scores(), pairwise=table), [Budget(Peak(), 100)])
    assert problem.pairwise is not None
    assert problem.pairwise[0].tolist() == [0, 1, 2, 3, 4, 6, 7, 8]


def test_shared_activations_link_units():
    """b and c must agree: 4 bits or 8 bits for both."""
    problem = build_problem(scores(share=[("b", "c")]), [])
    assert problem.is_linked
    assert problem.agrees((2, 0, 1))
    assert not problem.agrees((0, 0, 2))


@pytest.mark.parametrize("budget", [Budget(WeightSize(), 25), Budget(Peak(), 79)])
def test_a_budget_below_the_least_is_refused_before_scoring(budget):
    """The least size is 26 bytes, the least peak 80 bits; one less is refused, exactly that much is not."""
    space = scores().space
    with pytest.raises(InfeasibleBudgetError, match="the least is"):
        check_reachable(space, [budget])
    check_reachable(space, [replace(budget, limit=budget.limit + 1)])


def test_one_budget_per_cost():
    """Two budgets of one cost are refused by name."""
    with pytest.raises(BudgetError, match="size"):
        build_problem(scores(), [Budget(WeightSize(), 50), Budget(WeightSize(), 60)])


def test_the_loss_with_pairs_by_hand():
    """x'Px / 2 counts the diagonal half and every pair once."""
    pairwise = np.array([[2.0, 0, 3, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]])
    problem = replace(Problem.of([[1.0, 0.0], [1.0, 0.0]]), pairwise=pairwise)
    assert problem.objective((0, 0)) == 1 + 1 + (2 + 4) / 2 + 3
    assert problem.objective((1, 1)) == 0


def test_a_relative_budget_is_kept_whatever_the_menu():
    """w4 means 4 bits a weight also where the menu has 8 alone, so that it is refused and not quietly met at 8 bits."""
    inventory = Inventory((layer("a", 8), layer("b", 16), layer("c", 80)), (), "sha256:x")
    only_eight = Space.build(inventory, (Precision(8, 8),), pin={"a": "w8a8"})
    assert Budget(WeightSize(), "w4").resolve(only_eight) == 8 + 16 / 2 + 80 / 2
    with pytest.raises(InfeasibleBudgetError, match="size <= 56 B cannot be met: the least is 104 B"):
        check_reachable(only_eight, [Budget(WeightSize(), "w4")])
