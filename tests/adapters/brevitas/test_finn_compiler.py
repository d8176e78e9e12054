"""FINN's own compiler takes what the finn profile writes, and computes what the module does."""

import json
import os
import re

import numpy as np
import pytest
import torch
from finn_compiler import SHAPES, judged
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas.checkpoint import save
from mpq_brevitas.compilers import Report, Step, judge
from mpq_brevitas.convert import convert
from mpq_brevitas.finn_judge import STEPS
from mpq_brevitas.internals import activation_proxies
from mpq_brevitas.options import BrevitasOptions, options_of
from mpq_brevitas.ranges import calibrate
from torch import nn

import mpq_plugins as mpq
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.record import record
from mpq_plugins.cli.parser import main
from mpq_plugins.errors import AdapterError, VerificationError

with_finn = pytest.mark.skipif(
    "MPQ_FINN" not in os.environ, reason="FINN's compiler is not installed: .ci/finn-environment FOLDER, MPQ_FINN=FOLDER"
)


class Flattened(nn.Module):
    """A convolution behind ReLU, flattened and read by a linear layer."""

    def __init__(self, flatten) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.flatten, self.b = nn.Conv2d(3, 4, 3), flatten, nn.Linear(4 * 36, 5)

    def forward(self, x):
        return self.b(self.flatten(torch.relu(self.a(x))))


def _images():
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def _bits(model, text="w4a3"):
    inventory = mpq.find_layers(model, _images()[:1])
    return mpq.BitConfig({layer.name: text for layer in inventory}, inventory.fingerprint)


@with_finn
@pytest.mark.parametrize("name", SHAPES)
def test_finn_takes_the_file(name, tmp_path):
    """All steps pass, the graph computes what the module does as long as it runs, and every layer is in hardware."""
    report = judged(name, tmp_path).check()
    assert [step.name for step in report.steps] == list(STEPS)
    measured = {step.name for step in report.steps if step.difference is not None}
    assert measured >= {"qonnx_to_finn", "tidy_up", "streamline", "convert_to_hw", "create_dataflow_partition"}
    assert all(step.difference < 1e-5 for step in report.steps if step.name in measured)
    layers = [node.layer for node in report.nodes.values() if node.layer is not None]
    assert sorted(layers) == sorted(BrevitasAdapter(profile="finn").read_bits(tmp_path / f"{name}.onnx").layers)
    assert all(re.match("Transpose", node) for node in report.host), "the host only brings images into FINN's order"
    assert report.total["max_cycles"] == max(node.cycles for node in report.nodes.values())
    assert report.total["lut"] == pytest.approx(sum(node.lut for node in report.nodes.values()))


@with_finn
def test_what_finn_refuses_is_told_with_its_layer(tmp_path):
    """LeakyReLU between two layers: the step, FINN's node, and the layer in front of it."""
    report = judged("leaky", tmp_path)
    failed = report.steps[-1]
    assert (failed.name, failed.node, failed.layer) == ("create_dataflow_partition", "LeakyRelu_0", "0")
    with pytest.raises(VerificationError, match=r"create_dataflow_partition at LeakyRelu_0 \(layer 0\)"):
        report.check()


@with_finn
def test_wrong_outputs_are_found(tmp_path):
    """A module of other weights than the file's differs after every step that runs."""
    adapter, model, x = BrevitasAdapter(profile="finn"), nn.Sequential(nn.Linear(6, 3)), torch.randn(8, 6)
    inventory = mpq.find_layers(model, x)
    bits = mpq.BitConfig({layer.name: "w4a4" for layer in inventory}, inventory.fingerprint)
    path = adapter.export(adapter.prepare(model, bits, x, [x]), tmp_path / "net.onnx", x[:1])
    report = judge(path, nn.Linear(6, 3), x[:2])
    assert len(report.steps) == len(STEPS)
    assert not report.ok
    assert "after FINN's qonnx_to_finn" in report.problems[0]


@with_finn
def test_verify_asks_the_compiler(tmp_path, capsys):
    """`mpq verify --compiler` adds FINN's report to the others."""
    judged("perceptron", tmp_path)
    path, bits = tmp_path / "perceptron.onnx", tmp_path / "bits.json"
    BrevitasAdapter(profile="finn").read_bits(path).save(bits)
    compiler = os.environ["MPQ_FINN"]
    assert main(["verify", str(path), str(bits), "--adapter", "brevitas", "--compiler", compiler, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["compiler"]
    assert (told["ok"], len(told["steps"])) == (True, len(STEPS))
    assert told["total"]["lut"] > 0


def test_without_finn_the_way_to_it_is_told(tmp_path, monkeypatch):
    """No folder, or one without FINN: the command that makes it."""
    monkeypatch.delenv("MPQ_FINN", raising=False)
    for environment in (None, tmp_path):
        with pytest.raises(AdapterError, match=r"\.ci/finn-environment FOLDER"):
            judge(tmp_path / "net.onnx", environment=environment)


@pytest.mark.parametrize(("difference", "ok"), [(None, True), (1e-6, True), (1e-4, False), (float("nan"), False)])
def test_verdict_of_a_report(difference, ok, tmp_path):
    """Steps that cannot run say nothing; differences above 1e-5 and NaN do."""
    report = Report(tmp_path, "part", (Step("streamline", True, difference),), (), {}, {})
    assert report.ok == ok


@pytest.mark.parametrize("flatten", [nn.Flatten(), lambda x: x.flatten(1), lambda x: torch.flatten(x, 1)])
def test_flattened_activations_are_quantized_once(flatten):
    """However it is written: one unsigned quantizer behind the ReLU, of the width asked for, and the input's."""
    model = Flattened(flatten).eval()
    module = BrevitasAdapter(profile="finn").prepare(model, _bits(model), _images()[:1], [_images()])
    assert len(list(activation_proxies(module))) == 2
    with torch.no_grad():
        hidden = {}
        module.b.register_forward_hook(lambda _, given, __: hidden.update(value=given[0]))
        module(_images()[:1])
    codes = np.unique(np.asarray(getattr(hidden["value"], "value", hidden["value"])))
    assert len(codes) == 2**3, "no level is lost to a sign"


def test_checkpoints_with_a_second_quantizer_load(tmp_path):
    """A checkpoint that was written before flattened activations were quantized once keeps its outputs."""
    model = Flattened(nn.Flatten()).eval()
    bits, x = _bits(model), _images()
    old = BrevitasOptions("finn", flattened="requantized")
    module = convert(model, bits, old).module
    calibrate(module, [mpq.Batch.of(x)])
    assert len(list(activation_proxies(module))) == 3
    path = save(attach_bits(record(module.eval(), options=old), bits), tmp_path / "old.pt")
    document = torch.load(path, weights_only=True)
    recipe = json.loads(document["recipe"])
    del recipe["flattened"]
    torch.save({**document, "recipe": json.dumps(recipe)}, path)
    loaded = BrevitasAdapter(profile="finn").load(model, path, x[:1])
    assert options_of(loaded).flattened == "requantized"
    with torch.no_grad():
        assert torch.equal(loaded(x), module(x))
