"""Costs and budgets against the papers' published numbers and hand-worked ones."""

import pytest
import torch
import torchvision
from papers import PublishedSize
from torch import nn

from mpq_plugins import Budget, Precision, Space, find_layers, menu, residual_ties
from mpq_plugins.costs import ActivationMemory, BitOps, StoredSize, WeightSize
from mpq_plugins.costs.base import format_amount, parse_amount
from mpq_plugins.errors import BudgetError, InfeasibleBudgetError
from mpq_plugins.solvers.problem import check_reachable

MIB = 2**20
OMPQ_QAT = [8, *[8, 8, 8, 8], *[7, 8, 8, 8], *[8, 4, 6, 8], *[4, 4, 4, 4], 8]
CSMPQ_QAT = [8, *[8, 8, 8, 8], *[8, 8, 8, 8], *[7, 5, 8, 5], *[4, 4, 4, 4], 8]
OMPQ_PTQ_40 = [4, 4, 4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 4, 3, 2, 3, 3, 3]
OMPQ_PTQ_45 = [4, 3, 3, 4, 4, 4, 4, 4, 4, 4, 3, 3, 4, 4, 3, 3, 3, 3]


@pytest.fixture(scope="module")
def resnet18():
    inventory = find_layers(torchvision.models.resnet18(), torch.randn(1, 3, 224, 224))
    return Space.build(inventory, tie=residual_ties(inventory))


def assignment(space, weight_bits, activation_bits, edge_activation=None):
    edge = edge_activation or activation_bits
    ends = (0, len(weight_bits) - 1)
    return {
        name: Precision(bits, edge if index in ends else activation_bits)
        for index, (unit, bits) in enumerate(zip(space.units, weight_bits, strict=True))
        for name in unit.layers
    }


@pytest.mark.parametrize(
    ("bits", "mib"), [(OMPQ_QAT, "6.6986"), (CSMPQ_QAT, "6.6762"), (OMPQ_PTQ_40, "4.0000"), (OMPQ_PTQ_45, "4.4994")]
)
def test_published_resnet18_sizes(resnet18, bits, mib):
    """The published configurations have the published sizes in the papers' convention, to the digits shown."""
    assert f"{PublishedSize().at(resnet18, assignment(resnet18, bits, 8)) / MIB:.4f}" == mib


@pytest.mark.parametrize(
    ("bits", "activation", "giga"),
    [
        (OMPQ_QAT, 8, "96.73"),
        (OMPQ_QAT, 6, "74.44"),
        (CSMPQ_QAT, 6, "74.48"),
        (OMPQ_PTQ_40, 8, "49.57"),
        (OMPQ_PTQ_45, 8, "51.47"),
    ],
)
def test_published_resnet18_bops(resnet18, bits, activation, giga):
    """The published configurations have the published BOPs; the a6 figures keep stem and classifier at 8-bit activations."""
    bops = BitOps().at(resnet18, assignment(resnet18, bits, activation, edge_activation=8))
    assert f"{bops / 1e9:.2f}" == giga


def test_published_mobilenet_v2_size():
    """52 layers at 4 bits and the classifier at 3 take the published 1.5185 MiB."""
    inventory = find_layers(torchvision.models.mobilenet_v2(), torch.randn(1, 3, 224, 224))
    space = Space.build(inventory)
    assert len(space.units) == 53
    assert f"{PublishedSize().at(space, assignment(space, [4] * 52 + [3], 8)) / MIB:.4f}" == "1.5185"


@pytest.fixture(scope="module")
def tiny():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten(), nn.Linear(16, 5))
    return Space.build(find_layers(net, torch.ones(1, 3, 4, 4)), menu((2, 4, 5, 8), (4, 8)))


def test_costs_of_a_tiny_net_by_hand(tiny):
    """108 and 80 weights, 432 and 80 MACs, 48 and 16 input elements."""
    bits = {"0": Precision(5, 8), "2": Precision(2, 4)}
    assert WeightSize().at(tiny, bits) == (108 * 5 + 80 * 2) / 8
    assert BitOps().at(tiny, bits) == 432 * 40 + 80 * 8
    assert ActivationMemory().at(tiny, bits) == 48
    assert PublishedSize().at(tiny, bits) == (108 * 5 + 85 * 2) / 8
    # 5 bits are stored as 6; a float scale and bias for each of 4 and 5 channels; 32 bytes of ranges and shapes a layer.
    assert StoredSize().at(tiny, bits) == 81 + 20 + 8 * (4 + 5) + 64
    assert StoredSize(target="openvino-fast").at(tiny, bits) == 108 + 80 + 8 * (4 + 5) + 64
    assert StoredSize(target="qcdq").at(tiny, bits) == 108 + 80 + 8 * (4 + 5)


def test_a_shared_weight_is_stored_once():
    """Two layers on one parameter cost its bytes once and its BOPs twice."""
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    space = Space.build(find_layers(net, torch.ones(1, 4)))
    bits = dict.fromkeys(("0", "2"), Precision(4, 8))
    assert WeightSize().at(space, bits) == 8
    assert BitOps().at(space, bits) == 2 * 16 * 32


@pytest.mark.parametrize(
    ("text", "amount"),
    [("6.7MiB", 6.7 * MIB), ("500kB", 5e5), ("75G", 75e9), ("75GBOPs", 75e9), ("12", 12), ("1e6", 1e6), ("2 Ki", 2048)],
)
def test_amounts_with_units(text, amount):
    """Decimal and binary prefixes, with or without the unit."""
    assert parse_amount(text) == amount


@pytest.mark.parametrize("text", ["", "MiB", "6.7 parsecs", "-3M", "0", "nan", "w"])
def test_unreadable_amounts_are_errors(tiny, text):
    """What cannot be read, and what is not positive, is refused with an example of what can."""
    with pytest.raises(BudgetError):
        Budget(WeightSize(), text).resolve(tiny)


def test_relative_budgets(tiny):
    """`w4` is every free unit at 4 bits; fractions are interpolated; pinned layers keep their pins."""
    assert Budget(WeightSize(), "w4").resolve(tiny) == 188 / 2
    assert Budget(WeightSize(), "w4.5").resolve(tiny) == 188 * 4.5 / 8
    assert Budget(BitOps(), "w4a4").resolve(tiny) == 512 * 16
    pinned = Space.build(
        find_layers(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.ones(1, 8)), menu((2, 4)), pin={"0": "w8a8"}
    )
    assert Budget(WeightSize(), "w4").resolve(pinned) == 64 + 32


def test_an_infeasible_budget_names_the_least_and_the_largest(tiny):
    """The refusal says what can be reached and which layers hold it."""
    with pytest.raises(InfeasibleBudgetError, match=r"size <= 40 B cannot be met: the least is 47 B.*0 \(27 B\), 2 \(20 B\)"):
        check_reachable(tiny, [Budget(WeightSize(), 40)])
    check_reachable(tiny, [Budget(WeightSize(), 47)])
    with pytest.raises(InfeasibleBudgetError, match="activation_memory"):
        check_reachable(tiny, [Budget(ActivationMemory(), 23)])


def test_amounts_are_printed_as_people_write_them():
    """Bytes in binary units, operations in decimal ones."""
    assert format_amount(6.7 * MIB, "B") == "6.7 MiB"
    assert format_amount(96.73e9, "BOPs") == "96.73 GBOPs"
    assert format_amount(47, "B") == "47 B"


def test_a_target_does_not_store_every_width(tiny):
    """Binary weights cost nothing sensible where they cannot be stored: they are refused, not free."""
    with pytest.raises(BudgetError, match="openvino-compact stores no 1-bit weights"):
        StoredSize().of(tiny.layers[0], Precision(1, 8))


@pytest.mark.parametrize(
    ("text", "unit", "amount"), [("5ms", "ms", 5.0), ("5s", "ms", 5000.0), ("5mJ", "J", 0.005), ("3k", "s", 3e3)]
)
def test_amounts_in_a_unit_of_their_own(text, unit, amount):
    """SI prefixes of the cost's unit."""
    assert parse_amount(text, unit=unit) == pytest.approx(amount)


@pytest.mark.parametrize(("text", "unit"), [("5MJ", "mJ"), ("5Ms", "ms"), ("5m", "s"), ("300m", "us")])
def test_milli_and_mega_are_not_mixed_up(text, unit):
    """What differs by a factor of a billion is read by its letter, or refused where a letter alone says too little."""
    if text[-1] == "m":
        with pytest.raises(BudgetError, match="cannot read the amount"):
            parse_amount(text, unit=unit)
    else:
        assert parse_amount(text, unit=unit) == pytest.approx(5e9)
