"""Subclasses of torch's layers: quantized where they compute their parent's operation, else refused with the reason."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas import internals as brevitas
from mpq_brevitas.subclasses import padding_of, plain_form
from torch import nn
from torchvision.models.video.resnet import Conv3DSimple

import mpq_plugins as mpq
from mpq_plugins import BitConfig, FloatLayersWarning, Precision, find_layers
from mpq_plugins.errors import AdapterError


class Renamed(nn.Conv2d):
    """A subclass that only has another constructor."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 3)


class Same(nn.Conv2d):
    """The padding of TensorFlow, computed from the input's size, as EfficientNet and timm write it."""

    def forward(self, x):
        rows, columns = (
            max((math.ceil(size / step) - 1) * step + kernel - size, 0)
            for size, step, kernel in zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        )
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Module(nn.Conv2d):
    """Padding by a module of its own in front of the parent's forward pass, and an attribute that others read."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, 3, bias=False)
        self.pad, self.note = nn.ZeroPad2d((1, 0, 2, 1)), "kept"
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return super().forward(self.pad(x))


class Functional(nn.Linear):
    """A linear layer that writes out what its parent does, as timm's."""

    def forward(self, input):
        return F.linear(input, self.weight, bias=self.bias)


class Up(nn.ConvTranspose2d):
    """A transposed convolution with a forward pass of its own."""

    def forward(self, x):
        return F.conv_transpose2d(x, self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x):
        return self._conv_forward(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class Gained(nn.Linear):
    """Multiplies its result."""

    def forward(self, x):
        return 2 * super().forward(x)


class Shifted(nn.Conv2d):
    """Pads with ones, which no quantizer has as a code."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 1, 1, 1), value=1.0))


class Net(nn.Module):
    """Every subclass that qualifies, one of them called twice, one registered twice."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.even, self.uneven = Renamed(3, 4), Same(4, 4, 3), Same(4, 4, 3, stride=2, groups=4)
        self.module, self.up, self.head = Module(4, 4), Up(4, 4, 2, stride=2), Functional(4, 5)
        self.again = self.even

    def forward(self, x):
        x = self.again(torch.relu(self.even(torch.relu(self.plain(x)))))
        x = self.up(torch.relu(self.module(torch.relu(self.uneven(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def images(size=14):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))


def uniform(model, example, precision="w8a8", without=()):
    inventory = find_layers(model, example)
    names = [layer.name for layer in inventory if layer.name not in without]
    return BitConfig(dict.fromkeys(names, Precision.parse(precision)), inventory.fingerprint)


@pytest.fixture(scope="module")
def prepared(net):
    adapter, example = BrevitasAdapter(), images()
    assert not adapter.unconvertible(net, find_layers(net, example), example)
    return adapter.prepare(net, uniform(net, example), example, [example], bias_correction=False)


def distance(model, module, example):
    with torch.no_grad():
        expected = model(example)
        return float((module(example) - expected).abs().mean() / expected.std())


def test_everything_is_in(net):
    """The space of the whole network holds every layer, and no warning is given."""
    space = mpq.build_space(net, images(), adapter="brevitas", strict=True)
    assert [layer.name for layer in space.layers] == ["plain", "even", "uneven", "module", "up", "head"]
    assert not space.skipped or {item.n_weights for item in space.skipped} == {0}


@pytest.mark.parametrize("size", [14, 15, 22])
def test_eight_bits_are_close_to_float_at_any_size(net, prepared, size):
    """The padding follows the input's size as in the float network, which a recorded one would not."""
    assert distance(net, prepared, images(size)) < 0.05
    with brevitas.without_quantization(prepared):
        assert distance(net, prepared, images(size)) < 1e-6


def test_names_and_attributes_stay(net, prepared):
    """State-dict names, further parameters, attributes and aliases are those of the float network."""
    assert set(net.state_dict()) <= set(prepared.state_dict())
    assert prepared.module.note == "kept"
    assert torch.equal(prepared.module.gain, net.module.gain)
    assert prepared.again is prepared.even


def test_copies_and_checkpoints_compute_the_same(net, prepared, tmp_path):
    """A deep copy and a reloaded module give the same outputs, and a copy is independent of its original."""
    example, adapter = images(), BrevitasAdapter()
    copied, loaded = copy.deepcopy(prepared), adapter.load(net, adapter.save(prepared, tmp_path / "m.pt"), example)
    with torch.no_grad():
        expected = prepared(example)
        assert torch.equal(copied(example), expected)
        assert torch.equal(loaded(example), expected)
        copied.even.weight.zero_()
        assert torch.equal(prepared(example), expected)


@pytest.mark.parametrize("format", ["qonnx", "qcdq"])
@pytest.mark.parametrize("precision", ["w4a4", "w8a8"])
def test_exported_files_hold_the_bits_behind_a_pad(net, tmp_path, format, precision):
    """The file's codes, bits and outputs are the module's: the input is quantized in front of the padding."""
    adapter, example = BrevitasAdapter(), images()
    bits = uniform(net, example, precision)
    module = adapter.prepare(net, bits, example, [example])
    path = adapter.export(module, tmp_path / "m.onnx", example, format=format)
    report = mpq.verify(adapter, path, bits, module=module, inputs=example, model=net)
    assert report.ok, report.problems
    assert len(report.layers) == 6


def test_gradients_reach_the_weights(prepared):
    """A layer with a forward pass of its own trains: its weight gets a gradient through the quantizer."""
    module = copy.deepcopy(prepared).train()
    module(images()).square().sum().backward()
    assert all(module.get_submodule(name).weight.grad.abs().sum() > 0 for name in ("even", "uneven", "module", "up", "head"))


@pytest.mark.parametrize("rounding", ["gptq", "gpfq", "learned"])
def test_roundings_take_them(net, rounding):
    """Rounding by GPTQ, GPFQ and learning runs through layers that pad."""
    example = images()
    bits = uniform(net, example, "w4a8", without=("up",))  # Brevitas' roundings leave out transposed convolutions
    module = BrevitasAdapter().prepare(net, bits, example, [example], rounding=rounding)
    assert distance(net, module, example) < 0.5


@pytest.mark.parametrize("profile", ["layerwise", "finn"])
@pytest.mark.parametrize(
    ("layer", "word"),
    [
        (lambda: Standardised(3, 4, 3), "weight standardisation"),
        (lambda: Shifted(3, 4, 3), "more than a padding with zeros"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2), Gained(144, 3)), "changes the result"),
    ],
)
def test_other_forward_passes_are_refused_with_the_reason(profile, layer, word):
    """What is more than padding and the parent's operation stays in float, is told, and is not prepared."""
    model, example = nn.Sequential(layer(), nn.Conv2d(4, 4, 1) if word != "changes the result" else nn.Identity()), images()
    adapter = BrevitasAdapter(profile)
    with pytest.warns(FloatLayersWarning, match=word if profile == "layerwise" else "forward pass of its own"):
        space = mpq.build_space(model, example, adapter=adapter)
    assert len(space.layers) == 1
    with pytest.raises(AdapterError, match="cannot quantize 0"):
        adapter.prepare(model, uniform(model, example), example, [example])


def test_without_an_example_only_plain_subclasses_are_known_to_convert(net):
    """A forward pass of its own is checked on an example; without one such a layer is refused with what is missing."""
    reasons = BrevitasAdapter().unconvertible(net, find_layers(net, images()))
    assert set(reasons) == {"even", "uneven", "module", "up", "head"}
    assert "only with an example" in reasons["even"]


def test_a_forward_pass_set_on_an_instance_is_not_lost():
    """A patched layer of the exact class that computes something else is refused, not replaced by the plain layer."""
    model, example = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)), images()
    model[0]._conv_forward = lambda x, weight, bias: F.conv2d(x, weight * 0.5, bias)
    reasons = BrevitasAdapter().unconvertible(model, find_layers(model, example), example)
    assert set(reasons) == {"0"}
    assert "another weight" in reasons["0"]


def test_r3d_18_has_all_its_layers():
    """torchvision's `Conv3DSimple`, which only has another constructor, is quantized: 21 of 21 layers of r3d_18."""
    model = torchvision.models.video.r3d_18(weights=None).eval()
    example = torch.randn(1, 3, 4, 24, 24)
    inventory = find_layers(model, example)
    assert sum(isinstance(module, Conv3DSimple) for module in model.modules()) == 16
    assert len(inventory) == 21
    assert not BrevitasAdapter().unconvertible(model, inventory, example)


class Traced(nn.Module):
    """Subclasses in a graph: one padded evenly at every size, one unevenly at even sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.uneven = Same(3, 4, 3), nn.BatchNorm2d(4), Same(4, 4, 3, stride=2)
        self.last, self.head = Renamed(4, 6), Functional(6, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.last(torch.relu(self.uneven(x))))
        return self.head(x.mean((2, 3)))


def test_the_finn_profile_takes_one_even_padding(tmp_path):
    """A graph needs exact classes: even padding becomes the layer's own, uneven padding is refused, the file verifies."""
    torch.manual_seed(0)
    model, example, adapter = Traced().eval(), images(), BrevitasAdapter("finn")
    with pytest.warns(FloatLayersWarning, match="one even padding"):
        space = mpq.build_space(model, example, adapter=adapter)
    assert [item.name for item in space.skipped] == ["uneven"]
    bits = uniform(model, example, without=("uneven",))
    module = adapter.prepare(model, bits, example, [example])
    assert module.stem.padding == (1, 1)
    assert distance(model, module, example) < 0.05
    path = adapter.export(module, tmp_path / "m.onnx", example)
    assert mpq.verify(adapter, path, bits, module=module, inputs=example, model=model).ok


def test_the_plain_form_computes_the_same():
    """Against the subclass itself, at sizes of every remainder; uneven padding has no plain form."""
    for layer in (Renamed(3, 4), Same(3, 4, 5), Functional(3, 4), Up(3, 4, 2, stride=2)):
        form = plain_form(layer)
        assert type(form).__module__.startswith("torch.nn")
        for size in (9, 10, 11):
            x = torch.randn(2, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, size, size)
            assert torch.allclose(form(x), layer(x), atol=1e-5)
    assert all(plain_form(layer) is None for layer in (Same(3, 4, 3, stride=2), Module(3, 4), Standardised(3, 4, 3)))
    assert plain_form(nn.Conv2d(3, 4, 3)) is None


@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (1, 1, 2, 2), (0, 1, 0, 0), (3, 0, 1, 2)])
def test_padding_is_read_off_the_values(pad):
    """Zeros before and after on each axis are those that `F.pad` was given; other changes are none."""
    x = torch.randn(2, 3, 5, 6)
    left, right, top, bottom = pad
    assert padding_of(x, F.pad(x, pad)) == ((0, 0), (0, 0), (top, bottom), (left, right))
    assert padding_of(x, F.pad(x, (1, 1, 1, 1), mode="replicate")) is None
    assert padding_of(x, x + 1) is None
    assert padding_of(x, x[..., :-1]) is None


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_with_values_of_the_input_is_read_back(tmp_path, mode):
    """A layer that pads with its own quantized values exports a file whose bits are read behind the padding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    adapter, example = BrevitasAdapter(), images()
    bits = uniform(model, example, "w4a6")
    path = adapter.export(adapter.prepare(model, bits, example, [example]), tmp_path / "m.onnx", example)
    assert adapter.read_bits(path) == bits
