"""What every proxy promises, whatever it measures."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import ORDERED, PROXIES
from torch import nn

from mpq_plugins import Scores, Space, find_layers, menu
from mpq_plugins.common.plugins import make


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Dropout(0.5),
        nn.Conv2d(8, 12, 1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 3, 12, 12, generator=generator), torch.arange(8) % 5) for _ in range(2)]


def space_of(model):
    inventory = find_layers(model, torch.zeros(1, 3, 12, 12))
    choices = menu(range(2, 9), (4, 8))
    return Space.build(inventory, choices, pin={"9": "w8a8"}, tie=[("0", "3")])


every_proxy = pytest.mark.parametrize("proxy", PROXIES, ids=repr)


@every_proxy
def test_scores_are_finite_repeatable_and_savable(proxy, tmp_path):
    """The same model and batches give the same numbers, and a saved score reads back equal."""
    model = small_net()
    space = space_of(model)
    first, second = (proxy.score(model, space, batches()) for _ in range(2))
    assert first.loss == second.loss
    assert np.isfinite(np.concatenate(first.loss)).all()
    read = Scores.load(first.save(tmp_path / "scores.json"))
    assert read.loss == first.loss
    assert read.space == first.space
    assert read.facts == json.loads(json.dumps(first.facts))
    assert read.proxy == proxy.recipe()


@pytest.mark.parametrize("proxy", ORDERED, ids=repr)
def test_more_bits_never_lose_more(proxy):
    """A choice with at least as many weight and activation bits has no larger loss."""
    model = small_net()
    scores = proxy.score(model, space_of(model), batches())
    for unit, losses in zip(scores.space.units, scores.loss, strict=True):
        for low, low_loss in zip(unit.choices, losses, strict=True):
            for high, high_loss in zip(unit.choices, losses, strict=True):
                if high.weight >= low.weight and high.activation >= low.activation:
                    assert high_loss <= low_loss


@every_proxy
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(proxy, training):
    """State, modes, hooks, gradients and the random state are what they were before."""
    model = small_net().train(training)
    space = space_of(model)
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    proxy.score(model, space, batches())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("proxy", [p for p in PROXIES if not p.name.endswith("-published")], ids=repr)
def test_the_recipe_makes_the_same_proxy(proxy):
    """Name and options are enough to build a proxy again, as the command line and saved files do."""
    recipe = proxy.recipe()
    assert make("proxies", recipe.pop("name"), recipe) == proxy
