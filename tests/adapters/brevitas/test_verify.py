"""`verify` on Brevitas files: what passes, what is named, and what rounding may do."""

import copy

import numpy as np
import onnx
import pytest
import torch
from mpq_brevitas import BrevitasAdapter

from mpq_plugins import BitConfig, Precision, find_layers, verify
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.errors import VerificationError


@pytest.mark.parametrize(("name", "profile"), [("residual", "layerwise"), ("residual", "finn"), ("odd", "layerwise")])
def test_whole(prepared, exported, name, profile):
    """Bits, codes and outputs of an untouched file pass, the outputs within 1e-5."""
    case = prepared(name, profile)
    found = verify(
        case.adapter, exported(name, profile), case.bits, module=case.module, inputs=case.example, tolerance=1e-5
    ).check()
    assert found.outputs.mean_relative < 1e-5


def test_other_bits(prepared, exported):
    """A configuration with one other width is reported by layer, and `check` raises."""
    case = prepared("cnn")
    other = BitConfig({**case.bits.layers, "fc": Precision(8, 8)}, case.bits.fingerprint)
    report = verify(case.adapter, exported("cnn"), other)
    assert [check.name for check in report.layers if not check.ok] == ["fc"]
    with pytest.raises(VerificationError, match="fc: asked for w8a8"):
        report.check()


def test_other_weights_and_outputs(prepared, exported):
    """A module whose last layer changed after the export is reported for its codes and for its outputs."""
    case = prepared("cnn")
    changed = copy.deepcopy(case.module)
    with torch.no_grad():
        changed.fc.weight.mul_(-1)
    report = verify(BrevitasAdapter(), exported("cnn"), case.bits, module=changed, inputs=case.example)
    assert [check.name for check in report.layers if check.n_different] == ["fc"]
    assert not report.outputs.ok
    assert np.isfinite(report.outputs.own_difference)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained digits net at w4a8, its QCDQ file, and test images."""
    net, batch = trained_digits_net(epochs=2), next(iter(digits(train=False, batch_size=32)))
    inventory = find_layers(net, batch.inputs)
    bits = BitConfig(dict.fromkeys((layer.name for layer in inventory), Precision(4, 8)), inventory.fingerprint)
    module = BrevitasAdapter().prepare(net, bits, batch.inputs, [batch])
    path = tmp_path_factory.mktemp("trained") / "net.onnx"
    return bits, module, BrevitasAdapter().export(module, path, batch.inputs, format="qcdq"), batch.inputs


@pytest.mark.parametrize(("part", "factor"), [("fc/weight_quant", 1.2), ("fc/input_quant", 16.0), ("fc.bias", 3.0)])
def test_wrong_numbers_of_a_trained_net(trained, tmp_path, part, factor):
    """Where all codes are right but one scale or bias is wrong, the outputs tell, and the net's rounding is no excuse."""
    bits, module, path, inputs = trained
    assert verify(BrevitasAdapter(), path, bits, module=module, inputs=inputs, tolerance=1e-4).ok
    model = onnx.load(path)
    wrong = next(
        tensor
        for tensor in model.graph.initializer
        if part in tensor.name and tensor.data_type == onnx.TensorProto.FLOAT and "zero_point" not in tensor.name
    )
    values = onnx.numpy_helper.to_array(wrong) * np.float32(factor)
    wrong.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), wrong.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    report = verify(BrevitasAdapter(), tmp_path / "wrong.onnx", bits, module=module, inputs=inputs)
    assert all(check.ok for check in report.layers)
    assert not report.outputs.ok
    assert report.outputs.allowed < report.outputs.mean_relative / 2
