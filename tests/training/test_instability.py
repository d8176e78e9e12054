"""AIWQ against hand-worked numbers and a numpy version of its own."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq_plugins.errors import FormatError, ModelError
from mpq_plugins.training import Instability, output_shift


def test_a_hand_worked_shift():
    """Two channels with known moments give the KL divergences worked out by hand, and their mean."""
    old = torch.tensor([[0.0, 1.0], [2.0, 3.0]])  # channels in columns: mean 1 and 2, deviation 1 and 1
    new = torch.tensor([[0.0, 0.0], [4.0, 4.0]])  # mean 2 and 2, deviation 2 and 2
    # ln(1/2) + (4 + 1) / 2 - 1/2 and ln(1/2) + (4 + 0) / 2 - 1/2
    expected = ((math.log(0.5) + 2.0) + (math.log(0.5) + 1.5)) / 2
    assert float(output_shift(new, old, 1)) == pytest.approx(expected, rel=1e-12)


def test_constant_and_broken_channels_are_left_out():
    """Channels of zero deviation, NaN or infinity in either output leave the mean over the others as it is."""
    old = torch.randn(6, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    new = old * 1.1 + 0.05
    alone = output_shift(new[:, :1], old[:, :1], 1)
    new[:, 1:2], old[:, 2:3] = 3.0, 0.0
    new[0, 3, 0, 0], old[0, 4, 0, 0] = math.nan, math.inf
    assert float(output_shift(new, old, -3)) == float(alone)
    assert torch.isnan(output_shift(new[:, 1:], old[:, 1:], 1))


def test_tiny_steps_keep_their_digits():
    """A relative change of 1e-5, whose divergence is 1e-10, is measured to a percent in single precision."""
    old = torch.randn(64, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    new = old * (1 + 1e-3)
    assert float(output_shift(new, old, 1)) == pytest.approx(_numpy_shift(new, old), rel=1e-3)
    assert float(output_shift(old, old, 1)) == 0


def _numpy_shift(new, old):
    """The formula as written, over the second axis."""
    values = []
    for channel in range(new.shape[1]):
        y, z = (np.asarray(t[:, channel], dtype=np.float64).ravel() for t in (new, old))
        first = math.log(z.std() / y.std())
        values.append(first + (y.std() ** 2 + (y.mean() - z.mean()) ** 2) / (2 * z.std() ** 2) - 0.5)
    return float(np.mean(values))


def _numpy_layer(x, weight, layer):
    """A convolution by windows and sums, or a matrix product; without bias, which no divergence sees."""
    x, weight = np.asarray(x, dtype=np.float64), np.asarray(weight, dtype=np.float64)
    if weight.ndim == 2:
        return x @ weight.T
    stride, padding, dilation, groups = (
        (layer.stride, layer.padding, layer.dilation, layer.groups)
        if isinstance(layer, nn.Conv2d)
        else ((1, 1), (0, 0), (1, 1), 1)
    )
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axis=(2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    n, channels, height, width, *kernel = windows.shape
    windows = windows.reshape(n, groups, channels // groups, height, width, *kernel)
    weight = weight.reshape(groups, -1, *weight.shape[1:])
    return np.einsum("ngchwij,gocij->ngohw", windows, weight).reshape(n, -1, height, width)


@pytest.mark.parametrize(
    ("net", "kind"),
    [("mobile", "plain"), ("mobile", "brevitas"), ("mobile", "nncf"), ("digits", "brevitas"), ("digits", "nncf")],
)
def test_equals_numpy_on_every_layer(case, images, net, kind):
    """AIWQ of convolutions, strided, depthwise and functional, and of linear layers is numpy's own after weights moved."""
    made = case(net, kind)
    module = made.module
    meter = Instability(module, made.bits.layers)
    old = made.quantized_weights()
    with meter.watching():
        module(images)
    meter.on_step()
    _move_weights(module)
    new = made.quantized_weights()
    calls = _watched_calls(module, images, meter)
    values = meter.values
    assert set(values) == set(made.bits.layers)
    for name, value in values.items():
        layer = module if name == "kernel" else module.get_submodule(name)
        x = next(x for x, used in calls if torch.equal(used, new[name]))
        expected = _numpy_shift(*(_numpy_layer(x, weights[name], layer) for weights in (new, old)))
        assert 1e-6 < value < 1  # from 1 on a step is skipped
        assert value == pytest.approx(expected, rel=1e-3), name


def _move_weights(module):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1 and parameter.requires_grad and parameter[0].numel() > 1:
                parameter.add_(0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator))


def _watched_calls(module, images, meter):
    """Run under the meter, and note what convolutions and linear functions were really called with: (input, weight)."""
    calls = []

    class Note(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.conv2d, F.linear):
                calls.append([getattr(value, "value", value).detach().clone() for value in args[:2]])
            return function(*args, **(kwargs or {}))

    # Calls that inner modes pass on reach the outer ones: the note stands outside the meter.
    with Note(), meter.watching():
        module(images)
    return calls


def test_only_the_first_forward_pass_after_a_step_counts(case, images):
    """Further forward passes between two steps measure nothing; steps that change nothing measure 0."""
    made = case("mobile", "plain")
    meter = Instability(made.module, made.bits.layers)
    for _ in range(2):
        with meter.watching():
            made.module(images)
    assert meter.n_measured == 0
    meter.on_step()
    for _ in range(3):
        with meter.watching():
            made.module(images)
    assert meter.n_measured == 1
    assert meter.values == dict.fromkeys(made.bits.layers, 0.0)


def test_running_average_by_hand():
    """Shifts of 0.2 and 0.4 give (0.999 * 0.0002 + 0.0004) / (1 - 0.999^2); 3.0 and NaN are skipped."""
    meter = Instability(nn.Sequential(nn.Linear(2, 2)), ["0"])
    for shift in (0.2, 3.0, math.nan, 0.4):
        meter._record(0, torch.tensor(shift, dtype=torch.float64))
    assert meter.values["0"] == pytest.approx((0.999 * 0.0002 + 0.0004) / (1 - 0.999**2), rel=1e-12)
    assert meter.to_json() == {"0": {"running": pytest.approx(0.0005998), "steps": 2.0, "skipped": 1.0}}


def test_a_layer_beyond_the_limit_is_the_most_unstable():
    """Where all steps were skipped as too large the layer counts 1, above any measured one; order falls."""
    meter = Instability(nn.Sequential(*(nn.Linear(2, 2) for _ in range(3))), ["0", "1", "2"])
    meter._record(0, torch.tensor(0.3, dtype=torch.float64))
    meter._record(2, torch.tensor(7.0, dtype=torch.float64))
    assert meter.order == ("2", "0", "1")


def test_tied_weights_are_one(case):
    """Two layers with one weight are measured as the first, once per call."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    module = nn.Sequential(first, nn.ReLU(), second)
    meter = Instability(module, ["0", "2"])
    with meter.watching():
        module(torch.ones(8, 4))
    meter.on_step()
    with torch.no_grad():
        first.weight.mul_(1.1)
    with meter.watching():
        module(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)))
    assert list(meter.values) == ["0"]
    assert meter.to_json()["0"]["steps"] == 2


def test_state_goes_round_and_refuses_other_layers():
    """What was measured is restored exactly; a state of other layers is refused by name."""
    meter = Instability(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0", "1"])
    meter._record(1, torch.tensor(1 / 3, dtype=torch.float64))
    other = Instability(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["0", "1"])
    other.restore(meter.to_json())
    assert other.values == meter.values
    with pytest.raises(FormatError, match="unknown keys"):
        other.restore({**meter.to_json(), "2": {}})


def test_a_layer_without_weight_is_refused():
    """A name that leads to no weight is named, with what to give instead."""
    with pytest.raises(ModelError, match="no layer 'nowhere'"):
        Instability(nn.Sequential(nn.Linear(2, 2)), ["nowhere"])


def test_the_mean_over_processes_is_taken():
    """`average` replaces what was measured by what the processes agree on."""
    meter = Instability(nn.Sequential(nn.Linear(2, 2)), ["0"])
    meter._record(0, torch.tensor(0.2, dtype=torch.float64))
    meter.average(lambda table: (table + table * torch.tensor([3.0, 1.0, 1.0])) / 2)
    assert meter.values["0"] == pytest.approx(0.4)
