"""The code of docs/writing-a-plugin.md, as it stands there."""

import ast
import importlib.util
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mpq_plugins as mpq
from mpq_plugins.testing import check_adapter, check_cost, check_proxy, check_solver, example_batches, example_network
from mpq_plugins.training import parameter_groups

PAGE = Path(__file__).parent.parent / "docs" / "writing-a-plugin.md"
PUBLIC = {"mpq_plugins", *(f"mpq_plugins.{part}" for part in ("adapter", "quantizers", "space", "testing", "training"))}


def code():
    """All Python of the page."""
    return "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page as a module."""
    path = tmp_path_factory.mktemp("page") / "my_package.py"
    path.write_text(code())
    spec = importlib.util.spec_from_file_location("my_package", path)
    module = sys.modules["my_package"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["my_package"]


def test_names_are_public():
    """The page imports from the public packages only, and only names that these list."""
    imported = [node for node in ast.walk(ast.parse(code())) if isinstance(node, ast.ImportFrom)]
    ours = [(node.module, alias.name) for node in imported for alias in node.names if node.module.startswith("mpq_plugins")]
    assert len(ours) > 10
    for package, name in ours:
        assert package in PUBLIC
        assert not name.startswith("_")
        assert hasattr(importlib.import_module(package), name), name
    assert set(re.findall(r"\bmpq\.(\w+)", code())) <= set(mpq.__all__)


def test_the_suites_pass(page, tmp_path):
    """Proxy, solver and adapter keep every promise."""
    page.test_my_plugins(tmp_path)


def test_the_table_is_a_cost(page, tmp_path):
    """A table of latencies for all layers, and a budget in its unit."""
    model, example = example_network(), example_batches()[0].inputs
    layers = mpq.find_layers(model, example)
    every = mpq.menu(range(1, 9), range(2, 9))
    table = {layer.name: {str(own): layer.macs * own.weight * 1e-9 for own in every} for layer in layers}
    (tmp_path / "latency.json").write_text(json.dumps(table))
    page.test_my_table(model, example, tmp_path / "latency.json")
    cost = page.MeasuredLatency(str(tmp_path / "latency.json"))
    bits = mpq.allocate(model, example, budgets=[mpq.Budget(cost, "0.3ms")], proxy=page.ManyWeights(), solver=page.Tries()).bits
    assert sum(table[name][str(own)] for name, own in bits.layers.items()) <= 0.3e-3


def test_from_float_to_file(page, tmp_path):
    """Allocated, prepared, trained, saved, loaded, exported and verified; scales learn as ranges, weights as weights."""
    model, batches = example_network(), example_batches()
    data = [(batch.inputs, batch.labels) for batch in batches]
    trained = page.from_float_to_file(model, torch.cat([batch.inputs for batch in batches]), data, tmp_path)
    groups = {group["name"]: group["params"] for group in parameter_groups(trained, learning_rate=0.1, weight_decay=0.0)}
    n_layers = len(mpq.find_layers(model, batches[0].inputs))
    assert len(groups["ranges"]) == 2 * n_layers
    assert len(groups["weights"]) == n_layers


class Counted(mpq.AbstractCost):
    """A size that counts a shared weight twice."""

    name, unit = "counted", "B"

    def of(self, layer, precision):
        return layer.n_weights * precision.weight / 8


class Negative(Counted):
    def of(self, layer, precision):
        return 4.0 - precision.weight


class Draws(Counted):
    """Not the same for the same layer."""

    unit = "s"

    def of(self, layer, precision):
        return torch.rand(()).item()


@pytest.mark.parametrize(
    ("cost", "fact"),
    [(Counted(), "again, which is that of"), (Negative(), "at least 0"), (Draws(), "for a copy")],
    ids=["counted", "negative", "draws"],
)
def test_broken_costs_are_found(cost, fact):
    """Each is told by what it breaks."""
    with pytest.raises(AssertionError, match=fact):
        check_cost(cost)


def changing(proxy, model):
    model[0].weight.data += 1e-3


def training(proxy, model):
    model[1].eval()


def drawing(proxy, model):
    torch.rand(1)


def hooking(proxy, model):
    model[0].register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    ("act", "fact"),
    [(changing, "changes tensors"), (training, "training mode"), (drawing, "random numbers"), (hooking, "changes hooks")],
)
def test_broken_proxies_are_found(page, act, fact):
    """What a proxy leaves on the model is told."""

    class Broken(page.ManyWeights):
        def score(self, model, space, batches=()):
            act(self, model)
            return super().score(model, space, batches)

    with pytest.raises(AssertionError, match=fact):
        check_proxy(Broken())


def test_unrepeatable_and_hungry_proxies_are_found(page):
    """One that scores otherwise each time, and one that says it needs data and does not miss them."""

    class Drifting(page.ManyWeights):
        def score(self, model, space, batches=()):
            scores = super().score(model, space, batches)
            drift = time.perf_counter()
            return mpq.Scores(space, tuple(tuple(loss + drift for loss in row) for row in scores.loss), scores.proxy)

    class Hungry(page.ManyWeights):
        needs_data = True

    with pytest.raises(AssertionError, match="otherwise the second time"):
        check_proxy(Drifting())
    with pytest.raises(AssertionError, match="without images raises nothing"):
        check_proxy(Hungry())


@pytest.mark.parametrize(
    ("status", "fact"),
    [
        (mpq.Status.optimal, "can be reached"),
        (mpq.Status.infeasible, "says infeasible, but"),
        (mpq.Status.feasible, "was to prove"),
    ],
)
def test_broken_solvers_are_found(page, status, fact):
    """A wrong proof is told, and a missing one where the solver is to be exact."""

    class Claiming(page.Tries):
        def solve(self, problem):
            found = super().solve(problem)
            bound = found.objective if status is mpq.Status.optimal else found.bound
            choice = () if status is mpq.Status.infeasible else found.choice
            return replace(found, status=status, bound=bound, choice=choice) if found.choice else found

    with pytest.raises(AssertionError, match=fact):
        check_solver(Claiming(n_tries=2) if status is mpq.Status.optimal else Claiming())


def first_changed(values):
    name = next(iter(values))
    return {**values, name: values[name] + 1}


BROKEN = {
    "codes of another file": ("read_codes", first_changed, "the file holds other codes"),
    "codes too large": ("codes", lambda found: {name: own * 100 for name, own in found.items()}, "no whole numbers"),
    "bits of another file": ("read_bits", lambda found: without_first(found), "the file holds"),
    "another computation": ("run", lambda found: [array + 1 for array in found], "outputs differ"),
    "forgotten ranges": ("range_parameters", lambda found: found[1:], "not among range_parameters"),
    "another module": ("load", lambda found: noisy(found), "load gives another computation"),
    "no storage": ("storage", lambda found: 1, "storage"),
}


def without_first(bits):
    return replace(bits, layers=dict(list(bits.layers.items())[1:]))


def noisy(module):
    module[0].input_quantizer.scale.data *= 1.5
    return module


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_are_found(page, case, tmp_path):
    """One method at a time gives something wrong."""
    method, spoil, fact = BROKEN[case]
    right = getattr(page.FakeQuant, method)
    kind = type("Broken", (page.FakeQuant,), {method: lambda self, *args, **named: spoil(right(self, *args, **named))})
    with pytest.raises(AssertionError, match=fact):
        check_adapter(kind(), tmp_path)
