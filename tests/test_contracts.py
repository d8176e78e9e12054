"""Every registered plug-in, and variants of many options, under the suites of `mpq_plugins.testing`."""

import pytest
from helpers import ADAPTERS, HEURISTICS, ORDERED, PROXIES, SOLVERS

from mpq_plugins import Space, find_layers, menu
from mpq_plugins.common.plugins import make, names
from mpq_plugins.costs import StoredSize
from mpq_plugins.testing import check_adapter, check_cost, check_proxy, check_solver, example_batches, example_network

COSTS = [StoredSize(target=target) for target in ("openvino-fast", "onnx", "onnx-compact", "qcdq", "qonnx")]


def of(kind, more=()):
    """The registered plug-ins of a kind with their defaults, and `more`."""
    registered = [make(kind, name) for name in names(kind)]
    return [*registered, *(plugin for plugin in more if plugin not in registered)]


@pytest.mark.parametrize("proxy", of("proxies", PROXIES), ids=repr)
def test_proxy(proxy):
    """Scores are usable and repeatable, and the model is left as it was."""
    check_proxy(proxy)


@pytest.mark.parametrize("proxy", ORDERED, ids=repr)
def test_more_bits_never_lose_more(proxy):
    """A choice with at least as many weight and activation bits has no larger loss."""
    model = example_network()
    space = Space.build(find_layers(model, example_batches()[0].inputs), menu(range(2, 9), (4, 8)), tie=[("0", "3")])
    scores = proxy.score(model, space, example_batches())
    for unit, losses in zip(scores.space.units, scores.loss, strict=True):
        for low, low_loss in zip(unit.choices, losses, strict=True):
            for high, high_loss in zip(unit.choices, losses, strict=True):
                if high.weight >= low.weight and high.activation >= low.activation:
                    assert high_loss <= low_loss


@pytest.mark.parametrize("cost", of("costs", COSTS), ids=repr)
def test_cost(cost):
    """A cost follows from the facts of a layer, and a size counts a shared weight once."""
    check_cost(cost)


@pytest.mark.parametrize("solver", of("solvers", SOLVERS), ids=repr)
def test_solver(solver):
    """Answers are those of trying every plan."""
    check_solver(solver, exact=not isinstance(solver, HEURISTICS))


@pytest.mark.parametrize("adapter", of("adapters", ADAPTERS), ids=repr)
def test_adapter(adapter, tmp_path):
    """What is asked for is what the module and every file hold, and what they compute."""
    check_adapter(adapter, tmp_path)
