"""What is asked for is what the file holds, computes and weighs."""

from __future__ import annotations

import copy
import itertools
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
import torchvision
from mpq_nncf import NNCFAdapter
from nncf_nets import images, train
from torch import nn

from mpq_plugins import BitConfig, Budget, Precision, allocate, find_layers, verify
from mpq_plugins.costs import StoredSize
from mpq_plugins.costs.stored_size import packed_bytes
from mpq_plugins.errors import AdapterError

FORMATS = NNCFAdapter.formats
NETS = ("residual", "zoo", "attention", "chain")
# onnxruntime 1.31, opset 21: moved through a reshape, a signed quantizer says INT8 where its zero point has become UINT8.
# It does so on some CPUs only. Whatever else happens than this refusal fails.
_BROKEN = pytest.mark.xfail(raises=AdapterError, reason="onnxruntime does not load it; told before anything is written")
CASES = [
    pytest.param(net, format, marks=[_BROKEN] if (net, format) == ("chain", "onnx-compact") else [])
    for net, format in itertools.product(NETS, FORMATS)
]


def constant_bytes(path) -> dict[str, int]:
    """Bytes of every named weight constant, as the .xml states them."""
    layers = ElementTree.parse(path).getroot().find("layers")
    return {
        layer.get("name").removesuffix("/weight"): int(layer.find("data").get("size"))
        for layer in layers
        if layer.get("name").endswith("/weight")
    }


@pytest.mark.parametrize(("net", "format"), CASES)
def test_bits_and_codes_are_the_ones_asked_for(adapter, prepared, exported, net, format):
    """Bits read from the file equal those asked for, and every weight code equals the module's, for every kind of layer."""
    case = prepared(net)
    path = exported(net, format)
    assert adapter.read_bits(path) == case.bits
    assert adapter.read_bits(path).fingerprint == case.bits.fingerprint
    ours, theirs = adapter.codes(case.module), adapter.read_codes(path)
    assert ours.keys() == theirs.keys() == case.bits.layers.keys()
    for layer in find_layers(case.model, case.example):
        assert ours[layer.name].shape == layer.weight_shape
        np.testing.assert_array_equal(ours[layer.name], theirs[layer.name], err_msg=layer.name)


@pytest.mark.parametrize(("net", "format"), CASES)
def test_the_file_computes_what_the_module_computes(adapter, prepared, exported, net, format):
    """Exact execution differs from torch by float rounding only: on average below 1e-5 of the spread of the outputs."""
    case = prepared(net)
    inputs = images(64, seed=5)[0]
    with torch.no_grad():
        expected = case.module(inputs).numpy()
    (found,) = adapter.run(exported(net, format), inputs)
    assert np.abs(found - expected).mean() / expected.std() < 1e-5
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_default_execution_stays_close(adapter, prepared, exported):
    """With OpenVINO's integer kernels the outputs move by a few percent of their spread at most."""
    case = prepared("residual")
    inputs = images(64, seed=5)[0]
    with torch.no_grad():
        expected = case.module(inputs).numpy()
    (found,) = adapter.run(exported("residual", "openvino-fast"), inputs, exact=False)
    assert np.abs(found - expected).mean() / expected.std() < 0.1


@pytest.mark.parametrize("format", FORMATS)
def test_verify_passes(adapter, prepared, exported, format):
    """The core's verification accepts the file, codes and outputs included."""
    case = prepared("zoo")
    path = exported("zoo", format)
    assert verify(adapter, path, case.bits, module=case.module, inputs=case.example).check().ok


def test_every_weight_width_has_its_type(adapter, prepared, tmp_path):
    """Widths 2 to 8 are stored as u2, u3, i4, u6, u6, i8 and i8 in the compact form, and as i8 in the fast form."""
    case = prepared("residual")
    widths = dict(zip(case.bits.layers, (2, 3, 4, 5, 6, 7, 8), strict=True))
    bits = BitConfig({name: Precision(width, 8) for name, width in widths.items()}, case.bits.fingerprint)
    module = adapter.prepare(case.model, bits, case.example, [images(8)], batch_norm="kept", bias_correction=False)
    expected = {"openvino-compact": ("u2", "u3", "i4", "u6", "u6", "i8", "i8"), "openvino-fast": ("i8",) * 7}
    for format, types in expected.items():
        path = adapter.export(module, tmp_path / format, case.example, format=format)
        layers = ElementTree.parse(path).getroot().find("layers")
        stored = {layer.get("name"): layer.find("data").get("element_type") for layer in layers if layer.get("type") == "Const"}
        assert tuple(stored[f"{name}/weight"] for name in widths) == types
        assert adapter.read_bits(path) == bits


@pytest.mark.parametrize("net", ["residual", "zoo"])
def test_stored_size_predicts_the_constants(adapter, prepared, exported, net):
    """Every weight constant takes the bytes that StoredSize counts for it, and the whole file no more than their sum."""
    case = prepared(net)
    path = exported(net, "openvino-compact")
    stored, cost = constant_bytes(path), StoredSize("openvino-compact")
    layers = list(find_layers(case.model, case.example))
    for layer in layers:
        if layer.shares_weight_with is not None:
            assert layer.name not in stored
        else:
            width = adapter.storage(case.bits[layer.name], "openvino-compact")
            assert stored[layer.name] == packed_bytes(layer.n_weights, width)
    assert path.with_suffix(".bin").stat().st_size <= sum(cost.of(layer, case.bits[layer.name]) for layer in layers)


def test_stored_size_is_tight_on_mobilenet(adapter, tmp_path):
    """The bound is at most 3 % above the file of a network with 17 depthwise layers, allocated under it as a budget."""
    model, batch = torchvision.models.mobilenet_v2().eval(), images(8, seed=1)[0]
    limit = 2_600_000
    cost = StoredSize("openvino-compact")
    bits = allocate(model, batch[:1], [batch], proxy="random", budgets=[Budget(cost, limit)], adapter=adapter).bits
    path = adapter.export(adapter.prepare(model, bits, batch[:1], [batch]), tmp_path / "mobilenet", batch[:1])
    assert limit * 0.97 <= path.with_suffix(".bin").stat().st_size <= limit


def test_training_keeps_the_round_trip(adapter, prepared, tmp_path):
    """After steps of SGD on weights and scales the file still holds the module's codes, tied and shared layers included."""
    case = prepared("zoo")
    module = copy.deepcopy(case.module)
    before = {name: value.clone() for name, value in module.named_parameters()}
    train(module, steps=3)
    moved = {name for name, value in module.named_parameters() if not torch.equal(value, before[name])}
    assert any("hooks" in name for name in moved)
    assert "shared.weight" in moved
    inputs = images(32, seed=5)[0]
    with torch.no_grad():
        expected = module(inputs).numpy()
    for format in ("openvino-compact", "onnx"):
        path = adapter.export(module, tmp_path / format, case.example, format=format)
        assert adapter.read_bits(path) == case.bits
        ours, theirs = adapter.codes(module), adapter.read_codes(path)
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
        assert np.abs(adapter.run(path, inputs)[0] - expected).mean() / expected.std() < 1e-4


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        joint = torch.relu(self.first(a)) + torch.relu(self.second(b))
        return {"sum": joint.sum(1), "joint": joint}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("keywords", [False, True])
def test_several_inputs_and_outputs(adapter, tmp_path, format, keywords):
    """Models with positional or keyword inputs that return a dict are exported with all outputs in order."""
    torch.manual_seed(0)
    model, a, b = TwoInputs().eval(), torch.randn(8, 6), torch.randn(8, 5)
    example = {"b": b, "a": a} if keywords else (a, b)
    inventory = find_layers(model, example)
    bits = BitConfig({layer.name: Precision(5, 6) for layer in inventory}, inventory.fingerprint)
    module = adapter.prepare(model, bits, example, [(example, None)])
    path = adapter.export(module, tmp_path / "m", example, format=format)
    assert adapter.read_bits(path) == bits
    with torch.no_grad():
        expected = list(model_output(module, example).values())
    for ours, theirs in zip(adapter.run(path, example), expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def model_output(module, example):
    return module(**example) if isinstance(example, dict) else module(*example)
