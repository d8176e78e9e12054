"""Models and data as people have them, and errors of other libraries: wrappers are opened, the rest is told in our words."""

import copy
from dataclasses import dataclass

import pytest
import torch
from full_disk import full_disk
from mpq_brevitas import BrevitasAdapter
from mpq_nncf import NNCFAdapter
from torch import nn

from mpq_plugins import AbstractAdapter, BitConfig, allocate, build_space, find_layers, verify
from mpq_plugins.adapter.evaluate import accuracy
from mpq_plugins.adapter.stages import told
from mpq_plugins.cli.sources import load_weights
from mpq_plugins.common.plugins import make
from mpq_plugins.errors import (
    AdapterError,
    DataError,
    FormatError,
    ModelError,
    MPQError,
    VerificationError,
    WriteError,
)

ADAPTERS = [NNCFAdapter(), BrevitasAdapter(), BrevitasAdapter("finn")]
EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()


def bits_for(model, example=EXAMPLE):
    inventory = find_layers(model, example)
    return BitConfig({layer.name: "w4a8" for layer in inventory}, inventory.fingerprint)


def of_type(dtype):
    return lambda: net().to(dtype)


def with_nan():
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    return model


def compiled_in_place():
    model = net()
    model[3].compile()
    return model


def with_a_compiled_part():
    model = net()
    model[3] = torch.compile(model[3])
    return model


class FSDPModule(nn.Linear):
    """What fully_shard() makes of a layer has a class of this name among its bases."""


class FSDPLinear(FSDPModule):
    """One such layer."""


WRAPPED = {
    "compiled": torch.compile,
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
}
REFUSED = {
    "half": (of_type(torch.float16), "is of type float16"),
    "bfloat16": (of_type(torch.bfloat16), "is of type bfloat16"),
    "scripted": (lambda: torch.jit.script(net()), "scripted or traced"),
    "traced": (lambda: torch.jit.trace(net(), EXAMPLE), "scripted or traced"),
    "scripted part": (lambda: nn.Sequential(torch.jit.script(net())), "0 .*scripted or traced"),
    "compiled part": (with_a_compiled_part, "3 .*compiled by itself"),
    "compiled in place": (compiled_in_place, "3 .*compiled in place"),
    "sharded part": (lambda: nn.Sequential(nn.Flatten(), FSDPLinear(108, 3)), "1 .*holds a shard"),
    "meta": (lambda: net().to("meta"), "meta device"),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(3)), "lazy parameters"),
    "exported": (lambda: torch.export.export(net(), (EXAMPLE,)), "Call its module"),
    "state": (lambda: net().state_dict(), "no torch.nn.Module"),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_the_module_inside_a_wrapper_is_taken(wrap):
    """Names, fingerprints, bits and outputs are those of the module inside."""
    plain, wrapped = net(), wrap(net())
    assert find_layers(wrapped, EXAMPLE) == find_layers(plain, EXAMPLE)
    found = allocate(wrapped, EXAMPLE, [EXAMPLE], budgets="size=w4", proxy="output-error", adapter="nncf")
    assert found.bits == allocate(plain, EXAMPLE, [EXAMPLE], budgets="size=w4", proxy="output-error", adapter="nncf").bits
    for adapter in ADAPTERS[:2]:
        module = adapter.prepare(wrapped, found.bits, EXAMPLE, [EXAMPLE])
        with torch.no_grad():
            assert torch.equal(module(EXAMPLE), adapter.prepare(plain, found.bits, EXAMPLE, [EXAMPLE])(EXAMPLE))


def test_prepared_modules_in_wrappers_are_exported_and_saved(tmp_path):
    """A wrapped prepared module has its bits, codes, checkpoint and file."""
    adapter, model = BrevitasAdapter(), net()
    bits = bits_for(model)
    module = nn.DataParallel(adapter.prepare(model, bits, EXAMPLE, [EXAMPLE]))
    path = adapter.export(module, tmp_path / "file.onnx", EXAMPLE)
    verify(adapter, path, bits, module=module, inputs=EXAMPLE).check()
    loaded = adapter.load(torch.compile(model), adapter.save(module, tmp_path / "module.pt"), EXAMPLE)
    assert torch.equal(loaded(EXAMPLE), module.module(EXAMPLE))


def test_weights_of_a_compiled_or_parallel_model_are_loaded(tmp_path):
    """The prefixes that the wrappers put before names go."""
    saved = nn.DataParallel(net())
    torch.save({f"_orig_mod.{name}": value for name, value in saved.state_dict().items()}, tmp_path / "weights.pt")
    model = net()
    nn.init.zeros_(model[3].weight)
    load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model[3].weight, saved.module[3].weight)


@pytest.mark.parametrize(("build", "text"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_searched_is_refused_at_once(build, text):
    """By every entry: listing layers, allocating, preparing."""
    model, bits = build(), bits_for(net())
    for use in (
        lambda: find_layers(model, EXAMPLE),
        lambda: build_space(model, EXAMPLE, adapter="nncf"),
        lambda: allocate(model, EXAMPLE, budgets="size=w4", proxy="uniform"),
        lambda: ADAPTERS[0].prepare(model, bits, EXAMPLE, [EXAMPLE]),
        lambda: ADAPTERS[1].prepare(model, bits, EXAMPLE, [EXAMPLE]),
    ):
        with pytest.raises(ModelError, match=text):
            use()


def test_weights_that_are_not_finite_are_refused_before_they_are_scored():
    """By scores that read no data too; a list of layers needs no values."""
    model, bits = with_nan(), bits_for(net())
    assert len(find_layers(model, EXAMPLE)) == 2
    for use in (
        lambda: allocate(model, EXAMPLE, budgets="size=w4", proxy="uniform"),
        lambda: ADAPTERS[0].prepare(model, bits, EXAMPLE, [EXAMPLE]),
        lambda: ADAPTERS[1].prepare(model, bits, EXAMPLE, [EXAMPLE]),
    ):
        with pytest.raises(ModelError, match=r"3\.weight holds 1 values that are not finite"):
            use()


def test_double_precision_is_scored_but_not_quantized():
    """Scores may be measured in float64; adapters refuse it before anything is scored."""
    model, example = net().double(), EXAMPLE.double()
    bits = allocate(model, example, budgets="size=w4", proxy="weight-error").bits
    for adapter in ADAPTERS:
        for use in (
            lambda adapter=adapter: build_space(model, example, adapter=adapter),
            lambda adapter=adapter: adapter.prepare(model, bits, example, [example]),
        ):
            with pytest.raises(ModelError, match="float64; adapters quantize float32"):
                use()


CALIBRATION = {
    "double": (EXAMPLE.double(), "float64, the example one"),
    "bytes": ((EXAMPLE * 10).byte(), "uint8, the example one"),
    "unbatched": (EXAMPLE[0], r"\(3, 6, 6\) of float32, the example one \(2, 3, 6, 6\)"),
    "empty": (EXAMPLE[:0], r"\(0, 3, 6, 6\)"),
    "nan": (EXAMPLE * torch.nan, "not finite"),
    "names": (["cat.png", "dog.png", "cow.png"], "no tensor"),
    "channels": (EXAMPLE[:, :2], "failed"),
}


@pytest.mark.parametrize("adapter", ADAPTERS[:2], ids=["nncf", "brevitas"])
@pytest.mark.parametrize(("batch", "text"), CALIBRATION.values(), ids=CALIBRATION)
def test_calibration_data_that_do_not_fit_are_told(adapter, batch, text):
    """Another type, no batch axis, no images, file names, another number of channels."""
    model = net()
    bits = bits_for(model)
    with pytest.raises(MPQError, match=text) as error:
        adapter.prepare(model, bits, EXAMPLE, [batch])
    assert isinstance(error.value, DataError) or text == "failed"


class Uncommon(nn.Module):
    """Ends in an operation that neither OpenVINO nor ONNX has."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.special.bessel_j0(self.linear(x))


@pytest.mark.parametrize(
    ("adapter", "format"),
    [(ADAPTERS[0], "openvino-compact"), (ADAPTERS[0], "onnx"), (ADAPTERS[1], "qonnx"), (ADAPTERS[1], "qcdq")],
)
def test_an_operation_that_a_format_lacks_is_told(tmp_path, adapter, format):
    """The converter's own error becomes ours, with its first words, and nothing is written."""
    model, example = Uncommon(), torch.randn(2, 4)
    module = adapter.prepare(model, bits_for(model, example), example, [example])
    with pytest.raises(AdapterError, match="bessel_j0"):
        adapter.export(module, tmp_path / "file", example, format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [0, 900])
@pytest.mark.parametrize(("adapter", "format"), [(adapter, format) for adapter in ADAPTERS[:2] for format in adapter.formats])
def test_a_full_disk_is_no_fault_of_the_model(tmp_path, adapter, format, room):
    """Exporting and saving say that the disk refused, not that an operation is missing; nothing half written stays."""
    model = net()
    module = adapter.prepare(model, bits_for(model), EXAMPLE, [EXAMPLE])
    for write in (
        lambda: adapter.export(module, tmp_path / "file", EXAMPLE, format=format),
        lambda: adapter.save(module, tmp_path / "module.pt"),
    ):
        with full_disk(room), pytest.raises(WriteError, match="with space left"):
            write()
        assert not list(tmp_path.iterdir())
        write()
        [path.unlink() for path in tmp_path.iterdir()]


class Mean(nn.Module):
    """One number for the whole batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).mean()


@pytest.mark.parametrize("adapter", ADAPTERS[:2], ids=["nncf", "brevitas"])
def test_an_output_of_the_whole_batch_is_compared_on_one_image(tmp_path, adapter):
    """A file that takes image by image cannot give the mean of eight: one image is compared."""
    model, example = Mean(), torch.randn(8, 4)
    bits = bits_for(model, example)
    module = adapter.prepare(model, bits, example, [example])
    path = adapter.export(module, tmp_path / "file", example)
    assert verify(adapter, path, bits, module=module, inputs=example).check().outputs.ok


def test_inputs_of_another_size_are_told(tmp_path):
    """Running a file on what it was not exported for is our error, with the runtime's words."""
    adapter, model = ADAPTERS[0], net()
    bits = bits_for(model)
    path = adapter.export(adapter.prepare(model, bits, EXAMPLE, [EXAMPLE]), tmp_path / "file.xml", EXAMPLE)
    with pytest.raises(VerificationError, match="running the file failed"):
        adapter.run(path, EXAMPLE[:, :1])


@dataclass(frozen=True)
class Failing(AbstractAdapter):
    """A stranger's adapter that raises what it holds."""

    error: object = None
    name = "failing"

    def refuse(self, layer, precision): ...
    def advice(self, layer, precision): ...
    def unconvertible(self, model, inventory, example=None):
        return {}

    def activation_groups(self, model, example):
        raise copy.copy(self.error)

    def prepare(self, model, bits, example, calibration, **options):
        raise copy.copy(self.error)

    def export(self, module, path, example, *, format=None):
        raise copy.copy(self.error)

    def read_bits(self, path):
        raise copy.copy(self.error)

    def codes(self, module): ...
    def read_codes(self, path): ...
    def run(self, path, inputs): ...
    def save(self, module, path): ...
    def load(self, model, path, example): ...


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (RuntimeError("first\nsecond"), AdapterError),
        (KeyError("x"), AdapterError),
        (AssertionError(), AdapterError),
        (OSError(28, "No space left on device"), WriteError),
        (VerificationError("ours"), VerificationError),
    ],
)
def test_every_adapter_tells_what_it_does_not_catch(error, wanted):
    """Other people's adapters too: the stage, the kind of error, the next step; ours pass untouched."""
    adapter = Failing(error)
    for use in (
        lambda: adapter.prepare(net(), None, EXAMPLE, []),
        lambda: adapter.prepare(model=net(), bits=None, example=EXAMPLE, calibration=[]),
        lambda: adapter.export(net(), "file", EXAMPLE),
    ):
        with pytest.raises(wanted) as caught:
            use()
        if wanted is AdapterError:
            assert str(caught.value).startswith("failing: ")
            assert type(error).__name__ in str(caught.value)
            assert "second" not in str(caught.value)
    with pytest.raises(FormatError if wanted is not VerificationError else VerificationError):
        adapter.read_bits("file")


def test_long_errors_become_one_line():
    """Tracers append whole graphs; OpenVINO begins with the place in its source."""
    assert told(RuntimeError("Exception from src/core/x.cpp:3:\nCheck 'a' failed at b.cpp\nthe reason\nmore")) == (
        "RuntimeError: the reason; more"
    )
    assert len(told(ValueError("x" * 9999))) < 330
    assert told(KeyError()) == "KeyError"


def test_accuracy_takes_wrapped_modules():
    """As evaluation after training in parallel does."""
    model = net().eval()
    labels = model(EXAMPLE).argmax(1)
    assert accuracy(nn.DataParallel(model), [(EXAMPLE, labels)]) == 1.0
    labels[0] = (labels[0] + 1) % 3
    assert accuracy(nn.DataParallel(model), [(EXAMPLE, labels)]) == 0.5


@pytest.mark.parametrize("adapter", ["nncf", "brevitas"])
def test_modules_made_in_inference_mode_can_be_trained(adapter):
    """Under `torch.inference_mode` a module is prepared as outside, and learns afterwards."""
    model = net()
    with torch.inference_mode():
        module = make("adapters", adapter).prepare(model, bits_for(model), EXAMPLE, [EXAMPLE] * 4)
    module.train()
    module(EXAMPLE).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in module.parameters())
