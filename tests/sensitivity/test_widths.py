"""Widths that are not measured: which they are, and that their losses follow the squared error of the weights."""

import numpy as np
import pytest
import torch
from torch import nn

from mpq_plugins import Space, find_layers, menu
from mpq_plugins.proxies import KLDivergence, LossIncrease, OutputError
from mpq_plugins.proxies.measuring import MeasurementOptions, SensitivityRun, keeping_measurements
from mpq_plugins.proxies.measuring.effects import _PieceRun
from mpq_plugins.proxies.measuring.widths import filled, measured_choices
from mpq_plugins.space.space import Unit


def unit(weights, activations=(8,)):
    return Unit(("layer",), menu(weights, activations), 0)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((2, 4, 8), (2, 4)),
        ((2, 3, 4, 5, 6, 8), (2, 3, 4, 6)),
        ((3, 4, 5, 6, 7, 8), (3, 4, 6, 8)),
        ((4, 8), (4,)),
        ((6, 8), (6,)),
        ((8,), (8,)),
    ],
)
def test_narrow_widths_and_every_other_wide_one_are_measured(weights, expected):
    """Every width up to 4 bits; above, none whose narrower neighbour is measured."""
    members = unit(weights)
    assert tuple(members.choices[index].weight for index in measured_choices(members)) == expected


def test_all_choices_are_measured_where_activations_have_some():
    """A loss of activations does not follow the error of the weights."""
    members = unit((2, 4, 8), (4, 8))
    assert list(measured_choices(members)) == list(range(6))


def test_a_loss_in_proportion_to_the_error_is_put_in_exactly():
    """Loss = 3 x squared error: the widths between and above come out as measured ones would."""
    members = unit((2, 3, 4, 5, 6, 8))
    error = {choice.weight: 5.0 * 4.0**-choice.weight for choice in members.choices}
    true = np.asarray([3 * error[choice.weight] for choice in members.choices])
    losses = true.copy()
    losses[[index for index in range(6) if index not in measured_choices(members)]] = np.nan
    np.testing.assert_allclose(filled(members, losses, error.__getitem__), true, rtol=1e-12)


def test_between_two_measured_widths_the_ratio_is_their_mean():
    """Errors 1, 1/4, 1/16 and ratios 2 and 6 at the ends: 4 in the middle, so the loss is 1."""
    members = unit((4, 5, 6))
    error = {4: 1.0, 5: 0.25, 6: 0.0625}
    losses = np.asarray([2.0 if choice.weight == 4 else 6 / 16 if choice.weight == 6 else np.nan for choice in members.choices])
    at = [choice.weight for choice in members.choices].index(5)
    assert filled(members, losses, error.__getitem__)[at] == pytest.approx(1.0)


def test_a_width_that_changes_no_weight_loses_nothing():
    """An error of zero has a loss of zero, and says nothing of the others."""
    members = unit((4, 8))
    found = filled(members, np.asarray([0.0, np.nan]), lambda bits: 0.0)
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("proxy", [KLDivergence, LossIncrease, OutputError])
def test_measured_widths_are_those_of_the_full_measurement_at_less_cost(proxy):
    """What is measured does not change, what is put in is near it, and two of six widths are not run."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()
    images = torch.randn(32, 3, 8, 8)
    space = Space.build(find_layers(net, images[:1]), menu((2, 3, 4, 5, 6, 8)))
    whole = proxy(interpolate=False).score(net, space, [images])
    found = proxy().score(net, space, [images])
    kept = measured_choices(space.units[0])
    for own, full in zip(np.asarray(found.loss), np.asarray(whole.loss), strict=True):
        np.testing.assert_array_equal(own[kept], full[kept])
        np.testing.assert_array_less(np.abs(np.log(own / full)), np.log(1.6))  # what is put in is a guess of the size
    assert found.facts["layer_evaluations"] < 0.75 * whole.facts["layer_evaluations"]


def test_a_full_measurement_takes_nothing_from_one_of_some_widths(tmp_path, monkeypatch):
    """An interrupted measurement of losses leaves widths out; pairs of all choices are measured anew."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    images = torch.randn(16, 6)
    space = Space.build(find_layers(net, images[:1]), menu((2, 4, 8)))
    setup = MeasurementOptions(loss="kl", interpolate=True)
    expected = SensitivityRun(net, space, [images], setup).effects(pairs=True, curvature=False).pairs
    with keeping_measurements(tmp_path):
        killed = SensitivityRun(net, space, [images], setup)
        with monkeypatch.context() as patch:
            patch.setattr(_PieceRun, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                killed.effects(curvature=False)
        found = SensitivityRun(net, space, [images], setup).effects(pairs=True, curvature=False).pairs
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_the_squared_error_is_that_of_the_weights_of_a_unit():
    """Tied layers add theirs, a weight that two layers share counts once: worked out from the quantized weights."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    net, images = Net().eval(), torch.randn(16, 6)
    space = Space.build(find_layers(net, images[:1]), menu((2, 4, 8)), tie=[("a", "b")])
    [unit] = [index for index, members in enumerate(space.units) if "a" in members.layers]
    lab = SensitivityRun(net, space, [images], MeasurementOptions(loss="squared_error"))
    variants = lab.engine.variants
    expected = {
        bits: sum(float((variants.weight(name, bits) - getattr(net, name).weight.detach()).square().sum()) for name in "ab")
        for bits in (2, 4, 8)
    }
    assert {bits: lab._squared_error(unit, bits) for bits in (2, 4, 8)} == pytest.approx(expected)
    found = (
        SensitivityRun(net, space, [images], MeasurementOptions(loss="squared_error", interpolate=True))
        .effects(curvature=False)
        .losses
    )
    row = dict(zip((choice.weight for choice in space.units[unit].choices), found[lab.start[unit] :], strict=False))
    assert row[8] == pytest.approx(row[4] * expected[8] / expected[4])
