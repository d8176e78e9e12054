"""Layers that frameworks stumble over: they go through, or are refused before anything is calibrated."""

import copyreg

import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas.read import BrevitasGraph, call_name, layer_of_call
from mpq_nncf import NNCFAdapter
from torch import nn
from torch.nn.utils import parametrizations

from mpq_plugins import BitConfig, build_space, find_layers, verify
from mpq_plugins.adapter.spelled import Spelled
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.unread import unread_layers

NNCF, LAYERWISE, FINN = NNCFAdapter(), BrevitasAdapter(), BrevitasAdapter("finn")
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(**options):
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def round_trip(adapter, model, tmp_path, example=IMAGES, *, leave_out=(), format=None):
    """Prepare, export and verify; returns bits and file."""
    inventory = find_layers(model.eval(), example)
    bits = BitConfig({layer.name: "w4a8" for layer in inventory if layer.name not in leave_out}, inventory.fingerprint)
    module = adapter.prepare(model, bits, example, [example])
    path = adapter.export(module, tmp_path / "file", example, format=format)
    verify(adapter, path, bits, module=module, inputs=example).check()
    return bits, path


TRANSPOSED = {
    "one output": (lambda: nn.ConvTranspose2d(4, 1, 3), IMAGES),
    "one tap": (lambda: nn.ConvTranspose2d(4, 1, 1), IMAGES),
    "depthwise": (lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), IMAGES),
    "1d": (lambda: nn.ConvTranspose1d(4, 1, 3), IMAGES[:, :, 0]),
    "3d": (lambda: nn.ConvTranspose3d(4, 1, 3), IMAGES[:, :, None].repeat(1, 1, 4, 1, 1)),
}


@pytest.mark.parametrize("format", ["openvino-compact", "openvino-fast"])
@pytest.mark.parametrize(("layer", "example"), TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolutions_of_one_output_channel(tmp_path, layer, example, format):
    """NNCF takes the axis of their one scale for the first, which runs over the inputs."""
    torch.manual_seed(0)
    round_trip(NNCF, nn.Sequential(layer()), tmp_path, example, format=format)


class Twice(nn.Module):
    """A layer called twice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        return self.b(torch.relu(self.a(torch.relu(self.a(x)))))


class Aliased(nn.Module):
    """A layer under two names."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()
        self.again = self.a

    def forward(self, x):
        return self.b(torch.relu(self.again(torch.relu(self.a(x)))))


@pytest.mark.parametrize("adapter", [FINN, LAYERWISE, NNCF], ids=["finn", "layerwise", "nncf"])
@pytest.mark.parametrize("build", [Twice, Aliased])
def test_a_layer_that_stays_in_float_may_be_called_twice(tmp_path, adapter, build):
    """Left out of the bits it needs nothing of the conversion; the other layer is quantized as asked."""
    torch.manual_seed(0)
    assert set(round_trip(adapter, build(), tmp_path, leave_out=("a",))[0].layers) == {"b"}


class ZeroInit(nn.Module):
    """A residual branch that ends in a normalisation that begins at zero."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = conv(), nn.BatchNorm2d(4), conv()
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return self.b(torch.relu(x + self.norm(self.a(x))))


class ReZero(nn.Module):
    """A residual factor that begins at zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.factor = conv(), conv(), nn.Parameter(torch.zeros(1, 4, 1, 1))

    def forward(self, x):
        return self.b(torch.relu(x + self.factor * self.a(x)))


@pytest.mark.parametrize("format", NNCF.formats)
@pytest.mark.parametrize("build", [ZeroInit, ReZero])
def test_a_branch_that_begins_at_zero_is_stored(tmp_path, build, format):
    """OpenVINO would drop its weights; the file holds their codes and gives the module's outputs."""
    torch.manual_seed(0)
    _, path = round_trip(NNCF, build(), tmp_path, format=format)
    assert set(NNCF.read_codes(path)) == {"a", "b"}


@pytest.mark.parametrize("adapter", [FINN, LAYERWISE, NNCF], ids=["finn", "layerwise", "nncf"])
@pytest.mark.parametrize("names", [("a#1", "a#2"), ("a", "a#2"), ("#", "##2"), ("a/weight", "a/call_0"), ("a b", "[x]*")])
def test_names_with_signs_of_our_own(tmp_path, adapter, names):
    """What we mark calls and parts with may stand in names of modules."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, layer in zip((names[0], "relu", names[1]), (conv(), nn.ReLU(), conv()), strict=True):
        model.add_module(name, layer)
    bits, path = round_trip(adapter, model, tmp_path)
    assert set(bits.layers) == set(adapter.read_bits(path).layers) == set(names)


def test_calls_of_a_layer_whose_second_name_is_taken(tmp_path):
    """`a` is called twice beside a layer `a#2`."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = conv()
            self.add_module("a#2", conv())

        def forward(self, x):
            return self.a(torch.relu(self.get_submodule("a#2")(torch.relu(self.a(x)))))

    _, path = round_trip(LAYERWISE, Net(), tmp_path)
    assert sorted(name for name, _ in BrevitasGraph.load(path).calls()) == ["a", "a", "a#2"]
    known = {"a", "a#2", "b"}
    for layer in known:
        assert [layer_of_call(call_name(layer, number, known), known) for number in (1, 2, 3)] == [layer] * 3
    assert layer_of_call("Relu_3", known) is None


class Unread(nn.Module):
    """Computes something for nobody."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()

    def forward(self, x):
        self.c(torch.relu(self.b(x)))
        return self.a(x)


class Gated(nn.Module):
    """Reads a layer by a comparison, another by indices: autograd follows neither."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()

    def forward(self, x):
        best = self.c(x).detach().argmax(1, keepdim=True)
        return self.a(x) * (self.b(x) > 0) + x.gather(1, best)


@pytest.mark.parametrize("adapter", [FINN, LAYERWISE, NNCF], ids=["finn", "layerwise", "nncf"])
def test_a_layer_whose_output_is_not_used_is_refused_at_once(adapter):
    """It is skipped by the search with its reason, and refused by name before calibration."""
    model = Unread().eval()
    model.a.weight.requires_grad_(False)
    space = build_space(model, IMAGES, adapter=adapter)
    assert [layer.name for layer in space.layers] == ["a"]
    assert {item.name: "reaches no output" in item.reason for item in space.skipped} == {"b": True, "c": True}
    inventory = find_layers(model, IMAGES)
    bits = BitConfig({layer.name: "w4a8" for layer in inventory}, inventory.fingerprint)
    with pytest.raises(AdapterError, match=r"cannot quantize b.*reaches no output"):
        adapter.prepare(model, bits, IMAGES, (pytest.fail("calibrated") for _ in range(1)))
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, *[True] * 5]


def test_layers_that_autograd_does_not_see_are_not_unread():
    """Weights are as they were after the question."""
    model = Gated().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert unread_layers(model, find_layers(model, IMAGES), IMAGES) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Normalised(nn.Module):
    """Layers whose weights are computed, which stay in float, and one that is quantized."""

    def __init__(self):
        super().__init__()
        self.spectral, self.scaled = parametrizations.spectral_norm(conv()), parametrizations.weight_norm(conv())
        self.orthogonal, self.plain = parametrizations.orthogonal(nn.Linear(4, 4)), conv()

    def forward(self, x):
        x = self.plain(torch.relu(self.scaled(torch.relu(self.spectral(x)))))
        return self.orthogonal(x.mean((2, 3)))


@pytest.mark.parametrize("format", [*NNCF.formats, *LAYERWISE.formats])
def test_weights_that_are_computed_are_written_as_they_are(tmp_path, format):
    """No format has the operations of spectral norm's products or of a matrix exponential; the module keeps them."""
    torch.manual_seed(0)
    adapter, model = NNCF if format in NNCF.formats else LAYERWISE, Normalised()
    bits, _ = round_trip(adapter, model, tmp_path, leave_out=("spectral", "scaled", "orthogonal"), format=format)
    assert set(bits.layers) == {"plain"}
    assert model(IMAGES).shape == (2, 4)
    assert all(hasattr(layer, "parametrizations") for layer in (model.spectral, model.scaled, model.orthogonal))


@pytest.mark.parametrize("format", LAYERWISE.formats)
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(2, 3), (3, 4)])
def test_same_padding_of_dilated_convolutions(tmp_path, format, dilation, kernel):
    """onnxruntime has none; in numbers, with the odd one behind as torch puts it, outputs are the module's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, kernel, dilation=dilation, padding="same"))
    round_trip(LAYERWISE, model, tmp_path, torch.randn(2, 4, 12, 12), format=format)


WRITERS = {"openvino-compact": NNCF, "onnx": NNCF, "qonnx": LAYERWISE}
POOLING = [nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveMaxPool2d((2, None))]


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("pooling", POOLING, ids=str)
def test_pooling_that_leaves_an_axis_as_it_is(tmp_path, format, pooling):
    """A size of None, as text recognisers have it, which torch's ONNX exporter refuses."""
    torch.manual_seed(0)
    round_trip(WRITERS[format], nn.Sequential(conv(), pooling, conv()), tmp_path, format=format)
    assert None in pooling.output_size


class Differences(nn.Module):
    """Differences of neighbours along an axis, twice over and with something before them, and a sum of truth values."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(), conv()

    def forward(self, x):
        x = self.a(x)
        changed = torch.diff(x, prepend=x[..., :1] - 1, dim=-1) + x.diff(n=2, dim=2, append=x[:, :, :2])
        return self.b(changed * (x > 0).diff(dim=1, prepend=x[:, :1] > 1) + (x > 0).cumsum(1))


@pytest.mark.parametrize("format", WRITERS)
def test_differences_of_neighbours(tmp_path, format):
    """transformers' decoders look for packed sequences by them; no exporter has the operation."""
    torch.manual_seed(0)
    round_trip(WRITERS[format], Differences(), tmp_path, format=format)


@pytest.mark.parametrize("function", [torch.diff, torch.Tensor.diff])
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_spelled_differences_are_torchs(function, n, dim):
    """Along any axis, as often as asked, with something before or behind."""
    x, more = torch.randn(4, 5, 3), torch.randn(4, 5, 3)
    with Spelled():
        found = [function(x, n, dim), function(x, n=n, dim=dim, prepend=more), function(x, n, dim, more, more)]
    expected = [function(x, n, dim), function(x, n=n, dim=dim, prepend=more), function(x, n, dim, more, more)]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


class Transposes(nn.Module):
    """Reads accessors of tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.mT @ x.mH.mT)


@pytest.mark.parametrize("adapter", [LAYERWISE, NNCF], ids=["layerwise", "nncf"])
def test_accessors_of_tensors(tmp_path, adapter):
    """NNCF copies its graph, and Python's copy refuses `x.mT`."""
    torch.manual_seed(0)
    round_trip(adapter, Transposes(), tmp_path, IMAGES[:, 0])
    assert type(torch.Tensor.mT) not in copyreg.dispatch_table


class JoinedBiases(nn.Module):
    """Attention as timm's BEiT, EVA and Swin v2 have it: a tuple of parameters is joined to the bias of a functional call."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(6, 9, bias=False), nn.Linear(3, 3)
        self.q, self.v = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        self.register_buffer("k", torch.zeros(3), persistent=False)

    def forward(self, x):
        joined = nn.functional.linear(x, weight=self.qkv.weight, bias=torch.cat(tensors=(self.q, self.k, self.v)))
        q, k, v = joined.chunk(3, dim=-1)
        return self.out((q @ k.transpose(-2, -1)).softmax(-1) @ v + torch.stack((self.q, self.v)).sum(0))


@pytest.mark.parametrize("format", ["openvino-compact", "onnx"])
def test_parameters_in_a_tuple(tmp_path, format):
    """NNCF's trace knows those in lists only."""
    torch.manual_seed(0)
    bits, _ = round_trip(NNCF, JoinedBiases(), tmp_path, IMAGES[:, 0], format=format)
    assert set(bits.layers) == {"qkv", "out"}


class Positions(nn.Module):
    """A small network of relative positions beside the one of images, as Swin v2 and timm's relative positions have."""

    def __init__(self):
        super().__init__()
        self.positions, self.image, self.hidden = nn.Linear(2, 4), conv(), conv()
        self.register_buffer("table", torch.randn(36, 2))

    def forward(self, x):
        bias = torch.sigmoid(self.positions(self.table)).T.reshape(1, 4, 6, 6)
        return self.hidden(torch.tensor(torch.relu(self.image(x)).numpy()) + bias)


@pytest.mark.filterwarnings("ignore::mpq_plugins.FloatLayersWarning")
def test_a_layer_of_constants_is_skipped_by_nncf():
    """OpenVINO would fold it; a layer behind a detour over numpy, which no trace follows, is searched."""
    space = build_space(Positions().eval(), IMAGES, adapter=NNCF)
    assert [layer.name for layer in space.layers] == ["image", "hidden"]
    assert [item.name for item in space.skipped if "same for every image" in item.reason] == ["positions"]
