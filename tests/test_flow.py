"""Which tensor counts as a layer's feature map, against explicit hooks on well-known blocks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models.densenet import _DenseBlock
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock
from torchvision.ops import SqueezeExcitation

from mpq_plugins import find_layers
from mpq_plugins.model.watch import FeatureWatch


def features(model, images):
    """Layer name -> list of feature maps, as the watch hands them over."""
    found = {}

    def keep(names, feature):
        for name in names:
            found.setdefault(name, []).append(feature.clone())

    model.eval()
    layers = find_layers(model, images)
    with torch.no_grad(), FeatureWatch(model, layers, keep):
        model(images)
    return found


def outputs(model, images, *names):
    """Outputs of all calls of the named modules, one after the other, by plain forward hooks."""
    found = []
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_hook(lambda _m, _i, output: found.append(output.clone())) for name in names]
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return found


def assert_features(found, expected):
    assert found.keys() == expected.keys()
    for name, feature in expected.items():
        assert len(found[name]) == 1, name
        assert torch.equal(found[name][0], feature), name


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_basic_block_ends_after_the_add_and_the_relu():
    """The first convolution's feature is after the ReLU; the second's and the shortcut's is the block's output."""
    shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.BatchNorm2d(8))
    model = nn.Sequential(BasicBlock(4, 8, stride=2, downsample=shortcut), BasicBlock(8, 8))
    x = images(2, 4, 8, 8)
    first_relu, first_end, second_relu, second_end = outputs(model, x, "0.relu", "1.relu")
    expected = {"0.conv1": first_relu, "0.conv2": first_end, "0.downsample.0": first_end}
    assert_features(features(model, x), {**expected, "1.conv1": second_relu, "1.conv2": second_end})


def test_inverted_residual_ends_in_a_linear_bottleneck():
    """The projection has no activation: with a residual its feature is the sum, without one the normalised output."""
    model = nn.Sequential(InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 6, 2, 2))
    x = images(2, 8, 8, 8)
    expand, depthwise, end = outputs(model, x, "0.conv.0", "0.conv.1", "0")
    expand2, depthwise2, end2 = outputs(model, x, "1.conv.0", "1.conv.1", "1")
    expected = {"0.conv.0.0": expand, "0.conv.1.0": depthwise, "0.conv.2": end}
    assert_features(features(model, x), {**expected, "1.conv.0.0": expand2, "1.conv.1.0": depthwise2, "1.conv.2": end2})


def test_dense_block_ends_at_the_concatenation():
    """The bottleneck's feature is after its norm and ReLU, the growth convolution's is what is concatenated."""
    model = _DenseBlock(num_layers=2, num_input_features=4, bn_size=2, growth_rate=3, drop_rate=0.0, memory_efficient=False)
    x = images(2, 4, 6, 6)
    names = ["denselayer1.relu2", "denselayer1.conv2", "denselayer2.relu2", "denselayer2.conv2"]
    bottleneck1, growth1, bottleneck2, growth2 = outputs(model, x, *names)
    expected = {"denselayer1.conv1": bottleneck1, "denselayer1.conv2": growth1}
    assert_features(features(model, x), {**expected, "denselayer2.conv1": bottleneck2, "denselayer2.conv2": growth2})


class PreActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv1(self.first(self.norm1(x)))
        return x + self.conv2(self.second(self.norm2(out)))


def test_pre_activation_belongs_to_the_block_before():
    """A block's end is seen as the next block's convolution reads it; the last end is the plain sum."""
    model = nn.Sequential(PreActivation(), PreActivation())
    x = images(2, 4, 6, 6)
    inner1, read2, inner2, end = outputs(model, x, "0.second", "1.first", "1.second", "1")
    assert_features(features(model, x), {"0.conv1": inner1, "0.conv2": read2, "1.conv1": inner2, "1.conv2": end})


class Excited(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.gate, self.project = SqueezeExcitation(8, 2), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.project(self.gate(self.relu(self.norm(self.conv(x)))))


def test_squeeze_and_excitation_reads_the_feature():
    """The feature before the block ends where it is pooled; the gate is the feature of the block's last layer."""
    model = Excited()
    x = images(2, 3, 8, 8)
    before, inner, gate, end = outputs(model, x, "relu", "gate.activation", "gate.scale_activation", "project")
    assert_features(features(model, x), {"conv": before, "gate.fc1": inner, "gate.fc2": gate, "project": end})


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.head = nn.Linear(4, 2)
        self.kept = []

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel), inplace=True)
        self.kept.append(x)
        return {"logits": self.head(x.mean((2, 3)))}


def test_functional_convolutions_are_known_by_their_parameter():
    """A bare parameter given to `conv2d` has a feature map like any layer; outputs in a dict are features too."""
    model = Functional().eval()
    x = images(2, 3, 6, 6)
    with torch.no_grad():
        logits = model(x)["logits"]
    found = features(model, x)
    assert torch.equal(found["kernel"][0], model.kept[0])
    assert torch.equal(found["head"][0], logits)


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.conv(x)
        return self.after(x * torch.sigmoid(x))


def test_a_hand_written_swish_is_one_activation_function():
    """x * sigmoid(x) gives the same feature map as `nn.SiLU`."""
    model = Swish()
    x = images(2, 3, 6, 6)
    with torch.no_grad():
        expected = F.silu(model.conv(x))
    torch.testing.assert_close(features(model, x)["conv"][0], expected)


def test_calls_and_shared_weights_hand_over_every_call():
    """A module called twice has two feature maps, under one name."""
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Tanh())
    x = images(3, 4)
    first, second = outputs(model, x, "1", "3")
    found = features(model, x)
    assert [f.tolist() for f in found["0"]] == [first.tolist(), second.tolist()]


@pytest.mark.parametrize("computed", [parametrizations.weight_norm, torch.nn.utils.spectral_norm])
def test_weights_computed_from_others_are_known_by_their_module(computed):
    """Weight and spectral normalisation make a fresh weight per call, which is no parameter."""
    model = nn.Sequential(computed(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = images(2, 3, 6, 6)
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    relu, end = outputs(model, x, "1", "2")
    found = features(model, x)
    torch.testing.assert_close(found["0"][0], relu)
    torch.testing.assert_close(found["2"][0], end)
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
