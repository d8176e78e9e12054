"""What users write in place of an object: names, numbers, texts, classes. The unambiguous is taken, the rest told."""

import copy
import json
import pickle
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from mpq_plugins import (
    AbstractCost,
    AbstractProxy,
    Batch,
    BitConfig,
    Budget,
    Precision,
    Problem,
    Scores,
    Space,
    allocate,
    build_problem,
    build_space,
    find_layers,
    menu,
    solve,
    verify,
)
from mpq_plugins.common.files import write_json
from mpq_plugins.common.plugins import resolve_all
from mpq_plugins.costs import BitOps, WeightSize
from mpq_plugins.costs.budgets import as_budgets
from mpq_plugins.errors import BudgetError, FormatError, MPQError, PluginError, PrecisionError
from mpq_plugins.proxies import CLADO, Constant, WeightError
from mpq_plugins.solvers import MILP
from mpq_plugins.solvers.problem import check_reachable
from mpq_plugins.training import ProfitSchedule

EXAMPLE = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False)).eval()


@pytest.fixture(scope="module")
def space():
    """48 and 24 weights."""
    return Space.build(find_layers(net(), EXAMPLE), menu((2, 4, 8)))


@pytest.mark.parametrize("both", ["size=w4,bops=60%", ["size=w4", "bops=60%"], {"size": "w4", "bops": "60%"}])
def test_several_budgets_in_every_form(both):
    """One text with a comma, a list, a mapping."""
    assert as_budgets(both) == (Budget("size", "w4"), Budget(BitOps, "60%"))


def test_bits_and_compression_are_sizes(space):
    """In a `Budget` as in a text: 3.5 bits of 72 weights, and an eighth of 32."""
    assert Budget("bits", 3.5) == as_budgets({"bits": 3.5})[0] == Budget("size", "3.5 bits")
    assert Budget("compression", "8x").resolve(space) == 72 * 4 / 8


@pytest.mark.parametrize("budgets", ["size=w4", ["size=w4"], {"size": "w4"}, Budget("size", "w4")])
def test_the_steps_of_a_search_take_budgets_in_every_form(space, budgets):
    """One column of a problem, with the limit of 4 bits for each of 72 weights."""
    check_reachable(space, budgets)
    scores = Scores(space, ((0.0,) * 3,) * 2, {})
    assert [limit.limit for limit in build_problem(scores, budgets).limits] == [36.0]


@pytest.mark.parametrize("budgets", ["size=w4", ["size=w4"], {"size": "w4"}, Budget("size", "w4"), [Budget(WeightSize, "w4")]])
def test_budgets_in_every_form_are_the_same(space, budgets):
    """Text, list, mapping, object, and a cost by its name or class."""
    assert as_budgets(budgets) == (Budget(WeightSize(), "w4"),)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("bits=3.5", 72 * 3.5 / 8),
        ("compression=8", 72 * 4 / 8),
        ("compression=8x", 72 * 4 / 8),
        ("size=50%", 72 / 2),
        ("bops=25%", 72 * 64 / 4),
        ("size=30B", 30),
        ("bops=2kBOPs", 2000),
        ("size=3.5 bits", 72 * 3.5 / 8),
    ],
)
def test_budgets_in_bits_ratios_and_shares(space, text, limit):
    """72 weights, of 32 bits in float; shares are of the cost at w8a8, where a MAC is 64 bit operations."""
    assert as_budgets(text)[0].resolve(space) == pytest.approx(limit)


@pytest.mark.parametrize("limit", [np.float32(40), np.int64(40), np.array(40.0), torch.tensor(40.0), 40])
def test_numbers_of_other_libraries_are_numbers(space, tmp_path, limit):
    """numpy's and torch's scalars are budgets, and can be written into the file."""
    found = allocate(net(), EXAMPLE, budgets={"size": limit}, proxy="constant")
    assert found.bits.origin["budgets"][0]["limit"] == 40
    found.bits.save(tmp_path / "bits.json")


@pytest.mark.parametrize(
    "budgets",
    [
        None, 3, [3], [("size", "w4")], "size", "size=", "size=-1", "size=0%", "size=nan", "size=300us", "bops=3B",
        "bops=3bits", "bits=x", "bits=-1", "compression=0", "size=" + "9" * 5000, "size=w" + "9" * 400, "size=1e999",
        {"size": None}, {"size": True}, {"size": float("inf")}, {"size": [1]}, "sise=w4", {3: "w4"}, [],
    ],
)  # fmt: skip
def test_what_is_no_budget_is_told(space, budgets):
    """Wrong kinds, wrong units, endless digits."""
    with pytest.raises(MPQError):
        check_reachable(space, as_budgets(budgets))


@dataclass(frozen=True)
class Latency(AbstractCost):
    """A table in microseconds that may have holes."""

    name: ClassVar[str] = "latency"
    unit: ClassVar[str] = "us"
    table: dict = field(default_factory=lambda: {(name, bits): 10.0 * bits for name in "02" for bits in (2, 4, 8)})

    def of(self, layer, precision):
        return self.table[layer.name, precision.weight]


@pytest.mark.parametrize(("text", "limit"), [("120us", 120), ("0.12ms", 120), ("0.00012s", 120), ("120", 120), ("120 US", 120)])
def test_the_unit_of_a_cost_is_read(space, text, limit):
    """Its own unit, and SI prefixes of it."""
    assert Budget(Latency(), text).resolve(space) == pytest.approx(limit)


@pytest.mark.parametrize("text", ["120B", "120ns/layer", "120Ms2", "120 m"])
def test_another_unit_is_refused(space, text):
    """Bytes are no time; a bare m would be a million here and a thousandth there."""
    with pytest.raises(BudgetError, match="in us"):
        Budget(Latency(), text).resolve(space)


def test_a_cost_given_as_an_object_goes_all_the_way(tmp_path):
    """Its table has keys that JSON lacks; the file is checked where the cost is given again, and says so where it is not."""
    from mpq_brevitas import BrevitasAdapter

    adapter, model = BrevitasAdapter(), net()
    bits = allocate(model, EXAMPLE, budgets=[Budget(Latency(), "100us")], proxy=Constant, choices=(2, 4, 8)).bits
    bits = BitConfig.load(bits.save(tmp_path / "bits.json"))
    module = adapter.prepare(model, bits, EXAMPLE, [EXAMPLE])
    path = adapter.export(module, tmp_path / "file.onnx", EXAMPLE)
    report = verify(adapter, path, bits, module=module, inputs=EXAMPLE, model=model).check()
    assert report.budgets[0].found is None
    assert verify("brevitas", path, bits).check().layers == verify(BrevitasAdapter, path, bits).layers
    assert "not checked" in str(report.budgets[0])
    assert json.loads(report.save(tmp_path / "report.json").read_text())["budgets"][0]["found"] is None
    checked = verify(adapter, path, bits, module=module, inputs=EXAMPLE, model=model, costs=[Latency()]).budgets[0]
    assert checked.found == sum(10.0 * bits[name].weight for name in "02")
    assert str(checked) == f"budget latency: {checked.found:g} us of 100 us"


class Bare(AbstractCost):
    """No dataclass."""

    name = "bare"
    unit = "x"
    value: object = 1.0

    def of(self, layer, precision):
        return self.value


def bare(value):
    cost = Bare()
    cost.value = value
    return cost


@pytest.mark.parametrize("value", [None, "3", float("nan"), -1.0, [1.0], True])
def test_a_cost_that_gives_no_amount_is_told_before_scoring(monkeypatch, value):
    """None, text, NaN, less than nothing."""
    monkeypatch.setattr(Constant, "score", lambda *_: pytest.fail("scored"))
    with pytest.raises(BudgetError, match="the cost bare of 0 at w2a8 is"):
        allocate(net(), EXAMPLE, budgets=[Budget(bare(value), 3)], proxy=Constant())


def test_a_cost_table_with_a_hole_is_told_before_scoring(monkeypatch):
    """The layer, the precision and the error of the table."""
    monkeypatch.setattr(Constant, "score", lambda *_: pytest.fail("scored"))
    with pytest.raises(BudgetError, match=r"the cost latency fails for 0 at w3a8: KeyError"):
        allocate(net(), EXAMPLE, budgets=[Budget(Latency(), 100)], proxy=Constant())


def test_a_cost_without_options_needs_no_dataclass(tmp_path):
    """Its record in the file has no options."""
    bits = allocate(net(), EXAMPLE, budgets=[Budget(bare(np.float32(1)), 3)], proxy=Constant()).bits
    assert BitConfig.load(bits.save(tmp_path / "bits.json")).origin["budgets"][0]["options"] == {}


class Lists(AbstractProxy):
    """Returns its losses bare."""

    name = "lists"

    def score(self, model, space, batches=()):
        return [[0.0] * len(unit.choices) for unit in space.units]


def test_a_proxy_that_returns_no_scores_is_told():
    """A list of losses is not Scores."""
    with pytest.raises(PluginError, match="'lists' returned a list, not Scores"):
        allocate(net(), EXAMPLE, budgets="size=w4", proxy=Lists())


@pytest.mark.parametrize("plugin", ["weight-error", WeightError, WeightError()])
def test_plugins_by_name_as_class_and_as_object(plugin):
    """All the same; solvers and adapters too."""
    found = allocate(net(), EXAMPLE, budgets="size=w4", proxy=plugin, solver=MILP, adapter="brevitas")
    assert found.bits.origin["solver"] == "milp"
    assert found.scores.proxy["name"] == "weight-error"


@pytest.mark.parametrize(
    "wrong",
    [{"proxy": 3}, {"proxy": BitOps()}, {"solver": WeightError()}, {"adapter": net()}, {"adapter": dict}, {"solver": ""}],
)
def test_what_is_no_plugin_is_told(wrong):
    """Another kind's object, a number, a class of anything."""
    with pytest.raises(PluginError):
        allocate(net(), EXAMPLE, budgets="size=w4", **{"proxy": "constant", **wrong})


def test_solve_takes_the_name_of_a_solver():
    """As everywhere else."""
    assert solve(Problem.of([[1.0, 0.0]], [([[1, 2]], 2)]), "milp").choice == (1,)


@pytest.mark.parametrize("choices", [(2, 4, 8), ["w2", "w4a8", "8"], "2,4,8", {"*": (2, 4, 8)}, np.array([2, 4, 8])])
def test_menus_of_numbers_and_texts(choices):
    """Weight bits with activations of 8 bits."""
    assert build_space(net(), EXAMPLE, choices=choices).units[0].choices == menu((2, 4, 8))


@pytest.mark.parametrize("weight", [(2, 4, 8), "2,4,8", ["2", "4", "8"], range(2, 9, 2)])
def test_bit_widths_in_every_form(weight):
    """Numbers and texts; activations alike."""
    least = [Precision(2, 8), Precision(4, 8), *([Precision(6, 8)] if isinstance(weight, range) else []), Precision(8, 8)]
    assert menu(weight) == menu(weight, 8) == menu(weight, "8") == tuple(least)


@pytest.mark.parametrize("pins", [{"0": "w8a8"}, {"0": 8}, "0=w8a8", ["0=w8"], ("0=8",)])
def test_pins_in_every_form(pins):
    """A mapping, a text, a list of texts, as the command line has them."""
    found = build_space(net(), EXAMPLE, pin=pins)
    assert (dict(found.pins), found.units[0].choices) == ({"0": "w8a8"}, (Precision(8, 8),))


@pytest.mark.parametrize(
    "wrong",
    [
        {"tie": "02"}, {"tie": ["0", "2"]}, {"tie": 3}, {"tie": [3]}, {"pin": "0"}, {"pin": 3}, {"pin": ["0"]},
        {"include": 3}, {"exclude": [0]}, {"exclude": None}, {"exclude": "02"}, {"include": "02"},
    ],
)  # fmt: skip
def test_a_text_is_never_split_into_characters(wrong):
    """What would tie, pin or exclude layers 0 and 2 one by one is an error that shows what was given."""
    with pytest.raises(MPQError) as error:
        build_space(net(), EXAMPLE, **wrong)
    value = next(iter(wrong.values()))
    assert repr(value[0] if isinstance(value, list) else value) in str(error.value)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ProfitSchedule(widths="85"), "widths must be a list, each a whole number of at least 2, not '85'"),
        (lambda: BitConfig("0", ""), "map names to precisions, not '0'"),
        (lambda: allocate(net(), EXAMPLE, "digits", budgets="size=w4"), "'digits' is a text, not batches"),
        (lambda: menu("a,b"), "'a,b' is no list of bits"),
        (lambda: menu(2.5), "2.5 is no list of bits"),
        (lambda: resolve_all("costs", "size,sise"), "'sise'"),
        (lambda: resolve_all("costs", 3), "'3' (int) is none of the costs"),
    ],
)
def test_texts_and_numbers_in_place_of_lists_are_told(make, told):
    """The value and what it should be."""
    with pytest.raises(MPQError) as error:
        make()
    assert told in str(error.value)


@pytest.mark.parametrize("costs", ["size", ["size"], WeightSize, WeightSize(), (WeightSize,), "size,"])
def test_lists_of_plugins_in_every_form(costs):
    """Names, classes, objects; one alone is a list."""
    assert resolve_all("costs", costs) == (WeightSize(),)


@pytest.mark.parametrize("pin", [8, "8", "w8", "w8a8", Precision(8, 8), np.int64(8)])
def test_pins_of_numbers_and_texts(pin):
    """All mean w8a8."""
    assert build_space(net(), EXAMPLE, pin={"0": pin}).units[0].choices == (Precision(8, 8),)


@pytest.mark.parametrize(
    "wrong", [{"pin": {"0": 9}}, {"pin": {"0": None}}, {"choices": 2.5}, {"choices": (True,)}, {"choices": ("x",)}]
)
def test_what_is_no_precision_is_told(wrong):
    """Nine bits, nothing, halves, truth."""
    with pytest.raises(PrecisionError):
        build_space(net(), EXAMPLE, **wrong)


def test_bit_configurations_cannot_be_changed_in_place():
    """They are keys of caches: layers are read-only, copies and pickles equal, and texts are taken for precisions."""
    given = {"0": "w4a8", "2": 2}
    bits = BitConfig(given, "sha256:0")
    given["0"] = "w8"
    assert bits.layers == {"0": Precision(4, 8), "2": Precision(2, 8)}
    with pytest.raises(TypeError):
        bits.layers["0"] = Precision(8, 8)
    for other in (copy.deepcopy(bits), pickle.loads(pickle.dumps(bits))):
        assert (other, hash(other)) == (bits, hash(bits))


def test_values_with_arrays_can_be_compared_and_hashed(space):
    """Problems, limits, scores and batches are equal when they are one object; spaces by their units."""
    problem = Problem.of([[1.0, 0.0]], [([[1, 2]], 2)])
    scores = Scores(space, tuple((0.0,) * 3 for _ in space.units), {}, pairwise=np.zeros((6, 6)))
    for value in (problem, problem.limits[0], scores, Batch(EXAMPLE, torch.zeros(2))):
        assert value == value  # what raised before
        assert value != copy.deepcopy(value)
        assert len({value, copy.deepcopy(value)}) == 2
    assert len({space, copy.deepcopy(space)}) == 1


def test_a_document_that_json_cannot_hold_is_told(tmp_path):
    """NaN and keys that are no texts: our error, and no file."""
    for document in ({"a": float("nan")}, {(1, 2): 3}):
        with pytest.raises(FormatError, match="what JSON cannot"):
            write_json(tmp_path / "file.json", document)
    assert json.loads(write_json(tmp_path / "file.json", {"a": np.float32(1)}).read_text()) == {"a": 1.0}
    assert CLADO().setup().loss == "auto"
