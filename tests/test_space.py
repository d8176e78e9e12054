"""The decision space: pins, ties, shared activations, refusals."""

import pytest
import torch
import torchvision
from torch import nn

from mpq_plugins import Precision, Space, build_space, find_layers, first_and_last, menu, residual_ties
from mpq_plugins.errors import PrecisionError, SpaceError, UnknownLayerError


@pytest.fixture(scope="module")
def mlp():
    return find_layers(nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), torch.ones(1, 4))


def test_the_default_menu_is_weights_2_to_8(mlp):
    """Without choices every layer takes any weight width at 8-bit activations."""
    space = Space.build(mlp)
    assert all([str(c) for c in unit.choices] == [f"w{b}a8" for b in range(2, 9)] for unit in space.units)


def test_pins_leave_one_choice_and_are_recorded(mlp):
    """A pinned layer has a single choice, outside the menu if need be."""
    space = Space.build(mlp, menu((2, 3), (8,)), pin=first_and_last(mlp))
    assert [len(unit.choices) for unit in space.units] == [1, 2, 2, 1]
    assert space.pins == {"0": "w8a8", "3": "w8a8"}


def test_tied_layers_are_one_unit_in_layer_order(mlp):
    """Overlapping ties merge into one unit whose choices are those all members have."""
    space = Space.build(mlp, {"*": menu((2, 4)), "2": menu((4, 8))}, tie=[("2", "0"), ("2", "3")])
    assert [unit.layers for unit in space.units] == [("0", "2", "3"), ("1",)]
    assert space.units[0].choices == (Precision(4, 8),)


def test_layers_with_one_weight_are_tied_without_asking():
    """Two modules that hold the same parameter cannot have different weight bits."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    assert [unit.layers for unit in Space.build(find_layers(net, torch.ones(1, 4))).units] == [("0", "2")]


def test_shared_activations_bind_activation_bits_only(mlp):
    """Units of one activation group keep their own weights but lose activation bits the others cannot take."""
    space = Space.build(mlp, menu((2, 4), (4, 8)), pin={"0": "w8a8"}, share_activations=[("0", "1")])
    assert space.units[0].activation_group == space.units[1].activation_group != space.units[2].activation_group
    assert space.units[1].choices == (Precision(2, 8), Precision(4, 8))
    with pytest.raises(SpaceError, match="no activation bits in common"):
        Space.build(mlp, pin={"0": "w8a8", "1": "w8a4"}, share_activations=[("0", "1")])


def test_refused_precisions_leave_and_refused_layers_are_skipped(mlp):
    """A target's refusals shrink menus; a layer refused everywhere is skipped with the reason; a refused pin is an error."""

    def refuse(layer, precision):
        return "no 2-bit kernels" if precision.weight == 2 or layer.name == "1" else None

    space = Space.build(mlp, menu((2, 4)), refuse=refuse)
    assert [unit.layers[0] for unit in space.units] == ["0", "2", "3"]
    assert {item.name: item.reason for item in space.skipped} == {"1": "no 2-bit kernels"}
    with pytest.raises(SpaceError, match=r"pinned to w2a8.*no 2-bit"):
        Space.build(mlp, pin={"0": "w2a8"}, refuse=refuse)
    with pytest.raises(SpaceError, match="every layer was refused"):
        Space.build(mlp, refuse=lambda layer, precision: "never")


def test_names_that_match_nothing_are_errors(mlp):
    """A typo in a pin, a tie or a menu names the pattern."""
    for wrong in ({"pin": {"fc": "w8a8"}}, {"tie": [("fc", "0")]}, {"choices": {"fc": menu()}}):
        with pytest.raises(UnknownLayerError, match="'fc'"):
            Space.build(mlp, **wrong)


@pytest.mark.parametrize("bad", [(0, 8), (9, 8), (4, 1), (4, 9), (4.0, 8), (True, 8)])
def test_impossible_bits_are_refused(bad):
    """Only whole weight bits 1..8 and activation bits 2..8 exist."""
    with pytest.raises(PrecisionError, match="whole number"):
        Precision(*bad)


def test_residual_ties_of_resnet18():
    """Each down-sampling convolution is tied with the last convolution of its block, as in the papers: 18 units."""
    inventory = find_layers(torchvision.models.resnet18(), torch.randn(1, 3, 32, 32))
    ties = residual_ties(inventory)
    assert set(ties) == {(f"layer{n}.0.conv2", f"layer{n}.0.downsample.0") for n in (2, 3, 4)}
    assert len(Space.build(inventory, tie=ties).units) == 18


def test_the_tied_space_has_one_free_unit(mlp):
    """Uniform allocations are the solutions of the space whose free units are one."""
    tied = Space.build(mlp, menu((2, 4)), pin={"0": "w8a8"}).tied()
    assert [unit.layers for unit in tied.units] == [("0",), ("1", "2", "3")]


def test_the_space_survives_json(mlp):
    """A space read from its JSON equals the original."""
    space = Space.build(mlp, menu((2, 4), (4, 8)), pin={"0": "w8a8"}, share_activations=[("1", "2")])
    assert Space.from_json(space.to_json()) == space


def test_excluding_every_layer_is_told():
    """No layer left is an error of the space, with or without a target."""
    with pytest.raises(SpaceError, match="no layer is left"):
        build_space(nn.Linear(2, 2), torch.ones(1, 2), exclude=["*"])


def test_average_bits_are_told_for_all_layers_and_for_the_free_ones():
    """With 8 of 40 weights pinned at 8 bits, the size of uniform w4 is 4.8 bits on average, and 4 over the free layers."""
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Linear(4, 8, bias=False))
    space = build_space(net, torch.ones(1, 2), pin={"0": "w8a8"})
    limit = space.average_bits_of_size((8 * 8 + 32 * 4) / 8)
    assert (limit.overall, limit.free) == (4.8, 4.0)
    assert str(limit) == "4.80 over all searched layers, 4.00 over the free ones"
    assert space.average_bits({"0": Precision(8, 8), "1": Precision(3, 8)}).to_json() == {"all": 4.0, "free": 3.0}
    assert str(build_space(net, torch.ones(1, 2)).average_bits_of_size(20)) == "4.00"
    assert build_space(net, torch.ones(1, 2), pin={"*": "w8a8"}).average_bits_of_size(40).to_json() == {"all": 8, "free": None}


def test_shared_weights_count_once_in_the_average():
    """A weight that two layers hold is stored once, at one width."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    space = build_space(net, torch.ones(1, 4), pin={"2": "w8a8"})
    assert space.average_bits_of_size((16 * 2 + 16 * 8) / 8).to_json() == {"all": 5.0, "free": 2.0}


def test_one_string_is_one_pattern(mlp):
    """A string is never taken apart: not as a pattern to exclude or include, and not as a group of ties."""
    model, example = nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), torch.ones(1, 4)
    names = [layer.name for layer in find_layers(model, example, exclude="1*")]
    assert names == [str(index) for index in range(12) if not str(index).startswith("1")]
    assert [layer.name for layer in find_layers(model, example, include="1?")] == ["10", "11"]
    space = Space.build(find_layers(model, example), tie=["1?"])
    assert ("10", "11") in [unit.layers for unit in space.units]


@pytest.mark.parametrize("tie", [["2", "3"], [("2",)], [("2", "2")], "23"])
def test_a_tie_of_one_layer_is_told(mlp, tie):
    """A tie that ties nothing is an error, be it a forgotten pair of brackets or one name twice."""
    with pytest.raises(SpaceError, match=r"ties are groups|and a tie needs two"):
        Space.build(mlp, tie=tie)
