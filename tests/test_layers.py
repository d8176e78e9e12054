"""Layer discovery: facts against torch's own modules and numbers worked out by hand."""

import dataclasses
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from mpq_plugins import find_layers
from mpq_plugins.errors import ModelError, UnknownLayerError
from mpq_plugins.model.layers import Layer


class Zoo(nn.Module):
    """Every kind of layer once, one module called twice, a functional call, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.kernel = nn.Parameter(torch.randn(4, 6, 1, 1))
        self.conv1 = nn.Conv1d(4, 4, 3)
        self.conv3 = nn.Conv3d(1, 2, 3, padding=1)
        self.tied = nn.Linear(10, 10, bias=False)
        self.other = nn.Linear(10, 10, bias=False)
        self.other.weight = self.tied.weight
        self.never = nn.Linear(3, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = self.twice(F.relu(self.twice(x)))
        x = self.up(self.depthwise(x))
        x = F.conv2d(x, self.kernel)
        x = self.conv1(x.flatten(2))
        x = self.conv3(x.reshape(x.shape[0], 1, 2, 2, -1)).flatten(1)[:, :10]
        return self.other(F.relu(self.tied(x)))


@pytest.fixture(scope="module")
def zoo():
    torch.manual_seed(0)
    return Zoo()


@pytest.fixture(scope="module")
def inventory(zoo):
    return find_layers(zoo, torch.randn(2, 3, 8, 8))


def test_every_kind_is_found_in_order_of_the_call(inventory):
    """Module and functional layers appear in the order in which the forward pass calls them."""
    names = [layer.name for layer in inventory]
    assert names == ["stem", "twice", "depthwise", "up", "kernel", "conv1", "conv3", "tied", "other"]
    assert [layer.name for layer in inventory if layer.functional] == ["kernel"]


@pytest.mark.parametrize(
    ("name", "macs", "n_weights", "n_calls"),
    [
        ("stem", 8 * 3 * 9 * 64, 216, 1),
        ("twice", 2 * 8 * 8 * 9 * 64, 576, 2),
        ("depthwise", 8 * 9 * 64, 72, 1),
        ("up", 64 * 8 * 3 * 4, 8 * 3 * 4, 1),  # each input element meets 3 output channels of its group x 4 taps
        ("kernel", 256 * 4 * 6, 24, 1),
        ("conv1", 254 * 4 * 4 * 3, 48, 1),
        ("tied", 100, 100, 1),
    ],
)
def test_counts_equal_hand_worked_numbers(inventory, name, macs, n_weights, n_calls):
    """MACs are per image and include every call; weights are counted once."""
    layer = inventory[name]
    assert (layer.macs, layer.n_weights, layer.n_calls) == (macs, n_weights, n_calls)


def test_facts_of_single_layers(inventory):
    """Groups, channels, batch normalisation and shared weights are recorded where they are."""
    assert inventory["stem"].n_norm_parameters == 16
    assert inventory["twice"].n_norm_parameters == 0
    assert inventory["depthwise"].groups == 8
    assert (inventory["up"].groups, inventory["up"].out_channels) == (2, 6)
    assert inventory["other"].shares_weight_with == "tied"
    assert inventory["stem"].input_shape == (3, 8, 8)
    assert inventory["stem"].output_shape == (8, 8, 8)


def test_what_is_not_called_is_listed_with_the_reason(inventory):
    """A layer module that the forward pass never calls is skipped by name."""
    assert {item.name: item.reason.split()[0] for item in inventory.skipped} == {"never": "not"}


def test_macs_of_torchvision_networks():
    """MACs at 224x224 equal the figures that torchvision publishes for its models (GFLOPS column of its docs)."""
    for name, giga in (("resnet18", 1.814), ("mobilenet_v2", 0.301)):
        model = torchvision.models.get_model(name, weights=None)
        total = sum(layer.macs for layer in find_layers(model, torch.randn(1, 3, 224, 224)))
        assert total / 1e9 == pytest.approx(giga, abs=1e-3)


def test_the_model_is_left_as_it_was_found(zoo):
    """Modes, hooks, parameters and the random state are the same after discovery."""
    zoo.train()
    zoo.stem.eval()
    before = {name: value.clone() for name, value in zoo.state_dict().items()}
    state = torch.random.get_rng_state()
    find_layers(zoo, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert zoo.training
    assert not zoo.stem.training
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in zoo.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in zoo.modules())


class Forms(nn.Module):
    """Two inputs by keyword, a dataclass out."""

    @dataclasses.dataclass
    class Out:
        logits: torch.Tensor
        hidden: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left, right=None):
        hidden = self.a(left) + (0 if right is None else self.b(right))
        return Forms.Out(hidden.relu(), hidden)


@pytest.mark.parametrize(
    "example",
    [
        {"left": torch.ones(2, 4), "right": torch.ones(2, 5)},
        (torch.ones(2, 4), torch.ones(2, 5)),
    ],
)
def test_inputs_may_be_a_dict_or_a_tuple(example):
    """Keyword and positional inputs reach the forward pass, and any output form will do."""
    assert [layer.name for layer in find_layers(Forms(), example)] == ["a", "b"]


def test_an_optional_branch_that_is_not_taken_is_skipped():
    """What a given example does not call is not a layer of it."""
    inventory = find_layers(Forms(), torch.ones(2, 4))
    assert [layer.name for layer in inventory] == ["a"]
    assert [item.name for item in inventory.skipped] == ["b"]


def test_modules_registered_twice_are_one_layer_with_an_alias():
    """A module under two names keeps the first and remembers the second; asking by either finds it."""
    shared = nn.Linear(4, 4)
    inventory = find_layers(nn.Sequential(OrderedDict(one=shared, act=nn.ReLU(), two=shared)), torch.ones(1, 4))
    assert [(layer.name, layer.aliases, layer.n_calls) for layer in inventory] == [("one", ("two",), 2)]
    assert inventory["two"].name == "one"


def test_a_root_module_that_is_a_layer_is_found():
    """A bare layer is a model too."""
    assert [layer.weight_name for layer in find_layers(nn.Linear(4, 2), torch.ones(1, 4))] == ["weight"]


def test_include_and_exclude_are_globs_that_must_match(zoo):
    """Excluded layers are listed as skipped; the fingerprint stays that of the whole model; a typo is an error."""
    example = torch.randn(2, 3, 8, 8)
    whole, part = find_layers(zoo, example), find_layers(zoo, example, include=["t*"], exclude=["twice"])
    assert [layer.name for layer in part] == ["tied"]
    assert part.fingerprint == whole.fingerprint
    assert "twice" in {item.name for item in part.skipped}
    with pytest.raises(UnknownLayerError, match=r"'steam'.*stem"):
        find_layers(zoo, example, exclude=["steam"])


def test_the_fingerprint_follows_names_and_shapes():
    """Equal architectures agree whatever their weights; another width does not."""
    digests = [find_layers(nn.Sequential(nn.Linear(4, n)), torch.ones(1, 4)).fingerprint for n in (3, 3, 5)]
    assert digests[0] == digests[1] != digests[2]


def test_a_model_without_layers_and_a_failing_one_are_refused():
    """Nothing to quantize and a wrong example are errors that say so."""
    with pytest.raises(ModelError, match="calls no Conv"):
        find_layers(nn.ReLU(), torch.ones(1, 2))
    with pytest.raises(ModelError, match="failed on the example"):
        find_layers(nn.Linear(4, 2), torch.ones(1, 5))


def test_facts_survive_json(inventory):
    """A layer read from its JSON equals the original."""
    import json

    assert all(Layer.from_json(json.loads(json.dumps(layer.to_json()))) == layer for layer in inventory)
