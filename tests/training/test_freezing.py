"""Frozen weights, to the bit, while everything else trains; and who is in which parameter group."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq_plugins.digits import DigitsNet
from mpq_plugins.training import DuQ, Freezing, parameter_groups
from mpq_plugins.training.weights import weights_of


def _train(module, images, labels, optimizer, freezing, *, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        freezing.drop_gradients()
        optimizer.step()


def _snapshot(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _moved(module, before):
    return {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}


OPTIMIZERS = {
    "momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
    "adamw": lambda groups: torch.optim.AdamW(groups),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["brevitas", "nncf"])
def test_frozen_weights_do_not_move_by_one_bit(case, images, labels, kind, optimizer):
    """After steps that fill the momentum, frozen layers stay while all else moves; let go, they move again."""
    made = case("digits", kind)
    module, layers = made.module, ["stem", "layer2.0.conv1", "fc"]
    groups = parameter_groups(module, learning_rate=0.02, weight_decay=0.1)
    for group in groups:
        group["lr"] = 0.02  # visible steps for ranges too
    optimizer, freezing = OPTIMIZERS[optimizer](groups), Freezing()
    _train(module, images, labels, optimizer, freezing, steps=2)
    freezing.hold(weight for weights in weights_of(module, layers).values() for weight in weights)
    before = _snapshot(module)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    _train(module, images, labels, optimizer, freezing, steps=3)
    assert trainable - _moved(module, before) == {f"{name}.weight" for name in layers}
    freezing.hold(())
    _train(module, images, labels, optimizer, freezing, steps=1)
    assert {f"{name}.weight" for name in layers} <= _moved(module, before)


def _names(module, groups):
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {group["name"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


@pytest.mark.parametrize("kind", ["brevitas", "nncf", "float", "plain"])
def test_groups_hold_every_trainable_parameter_once(case, kind):
    """Weights, norms and biases, and ranges partition the trainable parameters, on every kind of module."""
    module = DigitsNet() if kind == "float" else case("mobile", kind).module
    names = _names(module, parameter_groups(module, learning_rate=0.1, weight_decay=1e-4))
    listed = [name for group in names.values() for name in group]
    assert sorted(listed) == sorted(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    floats = dict((DigitsNet() if kind == "float" else case("mobile", "brevitas").module).named_parameters())
    expected = {name for name, value in floats.items() if value.dim() > 1 and "quant" not in name}
    cleaned = {name.replace("parametrizations.", "").replace(".original", "") for name in names["weights"]}
    assert cleaned == expected
    # One range of the input and one of the weight per layer, 3 or 4 of them; NNCF's are per module too.
    assert len(names["ranges"]) == {"brevitas": 2 * 3, "nncf": 2 * 4, "float": 0, "plain": 0}[kind]
    assert {name.rpartition(".")[0] for name in names["norms and biases"]} >= {"bn", "fc"}


def test_rates_and_decays():
    """Weights decay; norms and biases do not; ranges learn at a hundredth of the rate and do not."""
    module = nn.Sequential(nn.Linear(2, 2), DuQ(4, signed=True), nn.LayerNorm((2, 2)), nn.PReLU(2))
    groups = parameter_groups(module, learning_rate=0.4, weight_decay=1e-4)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.4, 1e-4), (0.4, 0.0), (0.004, 0.0)]
    assert _names(module, groups) == {
        "weights": ["0.weight"],
        "norms and biases": ["0.bias", "2.weight", "2.bias", "3.weight"],
        "ranges": ["1.alpha", "1.gamma"],
    }
    torch.optim.SGD(groups)


def test_tied_and_untrainable_parameters():
    """A tied parameter is listed once; one that does not require gradients is not listed."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[1].weight = module[0].weight
    module[1].bias.requires_grad_(False)
    groups = parameter_groups(module, learning_rate=0.4, weight_decay=0.0)
    assert _names(module, groups) == {"weights": ["0.weight"], "norms and biases": ["0.bias"], "ranges": []}
    torch.optim.SGD(groups)
