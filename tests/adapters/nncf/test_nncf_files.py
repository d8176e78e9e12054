"""Files: tampering is seen, damage is told, checkpoints are exact, bits can be switched in place."""

from __future__ import annotations

import copy
import json
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mpq_nncf import NNCFAdapter
from mpq_nncf.ir_storage import TYPES, pack, unpack
from mpq_nncf.legacy_config import bitwidth_per_scope
from nncf_cases import make, mixed_bits
from nncf_nets import N_CLASSES, Residual, images

from mpq_plugins import BitConfig, Precision, find_layers, verify
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.errors import FingerprintError, FormatError, UnknownLayerError, WriteError


@pytest.fixture(scope="module")
def trained(adapter, tmp_path_factory):
    """A trained digits net at w4a8, its ONNX file, and test images."""
    net, batch = trained_digits_net(epochs=2), next(iter(digits(train=False, batch_size=32)))
    inventory = find_layers(net, batch.inputs)
    bits = BitConfig(dict.fromkeys((layer.name for layer in inventory), Precision(4, 8)), inventory.fingerprint)
    module = adapter.prepare(net, bits, batch.inputs, [batch])
    path = tmp_path_factory.mktemp("trained") / "net.onnx"
    return module, adapter.export(module, path, batch.inputs, format="onnx"), batch.inputs


def copied(path: Path, folder: Path) -> Path:
    for part in path.parent.glob(f"{path.stem}.*"):
        shutil.copy(part, folder)
    return folder / path.name


def xml_layer(path: Path, name: str) -> ElementTree.Element:
    return next(layer for layer in ElementTree.parse(path).getroot().find("layers") if layer.get("name") == name)


@pytest.mark.parametrize("storage", TYPES, ids=lambda storage: storage.name)
def test_packing_is_openvinos(storage):
    """Our packed bytes read back as the same codes, by us and by OpenVINO itself, for lengths that fill no byte."""
    import openvino
    from openvino.op import Constant

    for n_codes in (1, 5, 8, 31):
        codes = np.random.default_rng(n_codes).integers(-(2 ** (storage.bits - 1)), 2 ** (storage.bits - 1), n_codes, np.int8)
        data = pack(codes, storage)
        np.testing.assert_array_equal(unpack(data, n_codes, storage), codes)
        tensor = openvino.Tensor(getattr(openvino.Type, storage.name), openvino.Shape([n_codes]))
        tensor.data.reshape(-1).view(np.uint8)[:] = data
        theirs = [int(value) - storage.zero_point for value in Constant(tensor).get_value_strings()]
        assert theirs == codes.tolist()


def test_a_changed_code_is_seen(adapter, prepared, exported, tmp_path):
    """One flipped bit in the .bin shows as one wrong code of the right layer, and verification fails."""
    case = prepared("residual")
    path = copied(exported("residual", "openvino-compact"), tmp_path)
    data = bytearray(path.with_suffix(".bin").read_bytes())
    data[int(xml_layer(path, "b2/weight").find("data").get("offset"))] ^= 1
    path.with_suffix(".bin").write_bytes(data)
    ours, theirs = adapter.codes(case.module), adapter.read_codes(path)
    assert {name: int((ours[name] != theirs[name]).sum()) for name in ours} == {name: int(name == "b2") for name in ours}
    assert not verify(adapter, path, case.bits, module=case.module).ok


@pytest.mark.parametrize(("part", "factor"), [("fc/weight_scale", 1.2), ("Activation_output_0_scale", 1.5), ("fc.bias", 3.0)])
def test_wrong_numbers_of_a_trained_net_are_seen(adapter, trained, tmp_path, part, factor):
    """Where all codes are right but one scale or bias is wrong, the outputs tell, and the net's rounding is no excuse."""
    import onnx

    module, path, inputs = trained
    assert verify(adapter, path, bits_of(module), module=module, inputs=inputs, tolerance=1e-4).ok
    model = onnx.load(path)
    wrong = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(part))
    values = onnx.numpy_helper.to_array(wrong) * np.float32(factor)
    wrong.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), wrong.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    report = verify(adapter, tmp_path / "wrong.onnx", bits_of(module), module=module, inputs=inputs)
    assert all(check.ok for check in report.layers)
    assert not report.outputs.ok
    assert report.outputs.allowed < report.outputs.mean_relative / 2


def test_codes_wider_than_declared_are_measured(adapter, prepared, exported, tmp_path):
    """A code outside the declared width is reported as the width it needs."""
    case = prepared("residual")
    path = copied(exported("residual", "openvino-fast"), tmp_path)
    narrow = next(name for name, precision in case.bits.layers.items() if precision.weight < 8)
    data = bytearray(path.with_suffix(".bin").read_bytes())
    data[int(xml_layer(path, f"{narrow}/weight").find("data").get("offset"))] = 0x80  # -128
    path.with_suffix(".bin").write_bytes(data)
    found = adapter.read_bits(path)
    assert found[narrow].weight == 8
    assert {name for name in found.layers if found[name] != case.bits[name]} == {narrow}


def test_changed_levels_are_seen(adapter, prepared, exported, tmp_path):
    """Other FakeQuantize levels are reported as the width they have, not as declared."""
    case = prepared("residual")
    path = copied(exported("residual", "openvino-compact"), tmp_path)
    tree = ElementTree.parse(path)
    node = next(layer for layer in tree.getroot().find("layers") if layer.get("name") == "fc/activation")
    other = 4 if case.bits["fc"].activation != 2 else 8
    node.find("data").set("levels", str(other))
    tree.write(path)
    assert adapter.read_bits(path)["fc"].activation == other.bit_length() - 1


def test_onnx_tampering_is_seen(adapter, prepared, exported, tmp_path):
    """In ONNX too, a wider code and a wider clip are measured, not believed."""
    import onnx

    case = prepared("residual")
    path = copied(exported("residual", "onnx"), tmp_path)
    model = onnx.load(path)
    narrow = next(name for name, precision in case.bits.layers.items() if precision.weight < 8)
    codes = next(tensor for tensor in model.graph.initializer if tensor.name == f"{narrow}/weight")
    values = onnx.numpy_helper.to_array(codes).copy()
    values.reshape(-1)[0] = -128
    codes.CopyFrom(onnx.numpy_helper.from_array(values, codes.name))
    clip = [node for node in model.graph.node if node.op_type == "Clip"][-1]  # feeds the last layer
    high = next(tensor for tensor in model.graph.initializer if tensor.name == clip.input[2])
    limit = onnx.numpy_helper.to_array(high)
    high.CopyFrom(onnx.numpy_helper.from_array(np.array(limit // 2, limit.dtype), high.name))
    onnx.save(model, path)
    found = adapter.read_bits(path)
    assert found[narrow].weight == 8
    assert {name for name, asked in case.bits.layers.items() if found.layers.get(name) != asked} == {narrow, "fc"}


@pytest.mark.parametrize("suffix", [".xml", ".bin", ".onnx"])
def test_damaged_files_are_told(adapter, exported, tmp_path, suffix):
    """A file cut in half, and a missing one, raise FormatError naming it."""
    path = copied(exported("residual", "onnx" if suffix == ".onnx" else "openvino-compact"), tmp_path)
    part = path.with_suffix(suffix)
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
    with pytest.raises(FormatError, match=path.stem):
        adapter.read_bits(path)
    part.unlink()
    with pytest.raises(FormatError, match="does not exist"):
        adapter.read_bits(path)
    with pytest.raises(FormatError, match=r"neither \.xml"):
        adapter.read_bits(tmp_path / "model.bin")


def test_a_failed_export_leaves_the_old_pair(adapter, prepared, exported, tmp_path, monkeypatch):
    """When saving fails midway, the files of the last export stay whole and no debris is left."""
    import openvino

    path = copied(exported("residual", "openvino-compact"), tmp_path)
    before = {part.name: part.read_bytes() for part in tmp_path.iterdir()}

    def fail(model, where, **options):
        Path(where).with_suffix(".bin").write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(openvino, "save_model", fail)
    case = prepared("residual")
    with pytest.raises(OSError, match="disk full"):
        adapter.export(case.module, path, case.example)
    assert {part.name: part.read_bytes() for part in tmp_path.iterdir()} == before


@pytest.mark.parametrize("format", ["openvino-compact", "onnx"])
def test_a_place_that_refuses_is_told(adapter, prepared, tmp_path, format):
    """Below a file no folder can be made: WriteError names the path, and the file there stays as it was."""
    case = prepared("residual")
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(WriteError, match=r"cannot write .*file.m\..*Choose a file name"):
        adapter.export(case.module, tmp_path / "file" / "m", case.example, format=format)
    assert [(part.name, part.read_bytes()) for part in tmp_path.iterdir()] == [("file", b"kept")]


def test_files_of_others_are_told(adapter, prepared, exported, tmp_path):
    """Checkpoints and artifacts of another adapter, and files that are no checkpoint, are refused for what they are."""
    import onnx

    case = prepared("residual")
    torch.save({"format": "mpq-module/1", "adapter": "brevitas", "recipe": "{}"}, tmp_path / "theirs.pt")
    with pytest.raises(FormatError, match=r"of adapter 'brevitas'.*Load it with the adapter that saved it"):
        adapter.load(case.model, tmp_path / "theirs.pt", case.example)
    (tmp_path / "text.pt").write_text("{}")
    with pytest.raises(FormatError, match="no checkpoint") as caught:
        adapter.load(case.model, tmp_path / "text.pt", case.example)
    assert "weights_only" not in str(caught.value)
    path = copied(exported("residual", "onnx"), tmp_path)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"mpq": json.dumps({"format": "mpq-onnx/1", "adapter": "brevitas"})})
    onnx.save(model, path)
    with pytest.raises(FormatError, match=r"'mpq-onnx/1'.*Read it with the adapter that exported it"):
        adapter.read_bits(path)


def test_files_hold_no_paths(exported):
    """Exported files name no directory of the machine that wrote them."""
    for format in ("openvino-compact", "onnx"):
        path = exported("residual", format)
        text = path.read_bytes()
        assert b"site-packages" not in text
        assert str(path.parent).encode() not in text


@pytest.mark.parametrize("asymmetric", [False, True])
def test_checkpoints_are_exact(asymmetric, tmp_path):
    """A reloaded module computes bit for bit the same, with asymmetric quantizers too, and still exports and deep-copies."""
    adapter = NNCFAdapter(asymmetric=asymmetric)
    case = make("attention" if asymmetric else "chain", adapter)
    path = adapter.save(case.module, tmp_path / "module.pt")
    loaded = adapter.load(case.model, path, case.example)
    inputs = images(16, seed=6)[0]
    with torch.no_grad():
        expected = case.module(inputs)
        assert torch.equal(loaded(inputs), expected)
        assert torch.equal(copy.deepcopy(loaded)(inputs), expected)
    assert bits_of(loaded) == case.bits
    exported = adapter.export(loaded, tmp_path / "m", case.example)
    assert adapter.read_bits(exported) == case.bits
    assert np.abs(adapter.run(exported, inputs)[0] - expected.numpy()).mean() / expected.std() < 1e-5
    with pytest.raises(FingerprintError):
        adapter.load(_wider_head(case.model), path, case.example)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FormatError, match="no checkpoint, or a damaged one"):
        adapter.load(case.model, path, case.example)


def _wider_head(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    name, head = list(other.named_children())[-1]
    setattr(other, name, torch.nn.Linear(head.in_features, N_CLASSES + 1))
    return other


def test_bits_switch_in_place(adapter, prepared):
    """A w8a8 module switched to mixed bits equals one prepared at those bits, and back again equals itself."""
    case = prepared("residual")
    plain = {"weight_range": "max", "activation_range": "max", "bias_correction": False, "batch_norm": "kept"}
    data, inputs = [images(8)], images(16, seed=6)[0]
    wide = replace(case.bits, layers=dict.fromkeys(case.bits.layers, Precision(8, 8)))
    module = adapter.prepare(case.model, wide, case.example, data, **plain)
    fresh = adapter.prepare(case.model, case.bits, case.example, data, **plain)
    with torch.no_grad():
        before = module(inputs)
        assert torch.equal(adapter.set_bits(module, case.bits)(inputs), fresh(inputs))
        assert bits_of(module) == case.bits
        assert torch.equal(adapter.set_bits(module, wide)(inputs), before)
    with pytest.raises(UnknownLayerError):
        adapter.set_bits(module, replace(wide, layers={"gone": Precision(8, 8)}))


def test_legacy_scopes_are_those_of_nncf_2(adapter, tmp_path):
    """Scopes of torchvision's ResNet-18 equal those NNCF 2.x lists, and the file has the 2.x structure."""
    torchvision = pytest.importorskip("torchvision")
    model, example = torchvision.models.resnet18().eval(), torch.zeros(1, 3, 64, 64)
    inventory = find_layers(model, example)
    bits = BitConfig({layer.name: Precision(4, 6) for layer in inventory}, inventory.fingerprint)
    path = adapter.write_legacy_config(model, bits, example, tmp_path / "legacy.json")
    document = json.loads(path.read_text())
    assert document["target_device"] == "TRIAL"
    assert document["input_info"] == [{"sample_size": [1, 3, 64, 64]}]
    precision = document["compression"]["initializer"]["precision"]
    assert document["compression"]["algorithm"] == "quantization"
    assert precision["type"] == "manual"
    rows = precision["bitwidth_per_scope"]
    expected = [
        [4, "ResNet/NNCFConv2d[conv1]/conv2d_0|WEIGHT"],
        [4, "ResNet/Sequential[layer1]/BasicBlock[0]/NNCFConv2d[conv1]/conv2d_0|WEIGHT"],
        [4, "ResNet/Sequential[layer4]/BasicBlock[0]/Sequential[downsample]/NNCFConv2d[0]/conv2d_0|WEIGHT"],
        [4, "ResNet/NNCFLinear[fc]/linear_0|WEIGHT"],
        [6, "/nncf_model_input_0|OUTPUT"],
        [6, "ResNet/ReLU[relu]/relu__0|OUTPUT"],
        [6, "ResNet/Sequential[layer2]/BasicBlock[1]/ReLU[relu]/relu__1|OUTPUT"],
    ]
    assert all(row in rows for row in expected)
    assert sum(scope.endswith("|WEIGHT") for _, scope in rows) == 21
    shared = mixed_bits(Residual().eval(), images(2)[0], adapter)
    assert bitwidth_per_scope(Residual().eval(), shared, images(2)[0])
