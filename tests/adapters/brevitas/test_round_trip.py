"""What is asked for is what the exported file holds."""

import copy

import numpy as np
import onnx
import pytest
import torch
from brevitas_nets import ALL_PROFILES, CASES, network
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas.run import of_one_image

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.errors import AdapterError, FormatError

ARTIFACTS = [
    (name, profile, format)
    for name in CASES
    for profile in ("layerwise", "finn")
    for format in ("qonnx", "qcdq")
    if (profile == "layerwise" or name in ALL_PROFILES) and not (format == "qcdq" and name == "binary")
]


@pytest.mark.parametrize(("name", "profile", "format"), ARTIFACTS)
class TestArtifact:
    def test_bits(self, prepared, exported, name, profile, format):
        """The file alone holds exactly the asked weight and activation bits of every layer, and the fingerprint."""
        case = prepared(name, profile)
        found = case.adapter.read_bits(exported(name, profile, format))
        assert found == case.bits
        assert found.fingerprint == case.bits.fingerprint

    def test_codes(self, prepared, exported, name, profile, format):
        """Every integer weight code of the file equals the torch module's, in the float weight's shape."""
        case = prepared(name, profile)
        ours, files = case.adapter.codes(case.module), case.adapter.read_codes(exported(name, profile, format))
        assert ours.keys() == files.keys() == case.bits.layers.keys()
        for layer, codes in ours.items():
            np.testing.assert_array_equal(codes, files[layer], err_msg=layer)

    def test_outputs(self, prepared, exported, name, profile, format):
        """The file computes what the module computes, within 1e-5 of the largest output."""
        case = prepared(name, profile)
        expected, found = case.outputs(), case.adapter.run(exported(name, profile, format), case.example)
        assert len(expected) == len(found)
        for ours, files in zip(expected, found, strict=True):
            np.testing.assert_allclose(files, ours, rtol=0, atol=1e-5 * np.abs(ours).max())


@pytest.mark.parametrize("name", CASES)
def test_codes_fit_their_bits(prepared, name):
    """Codes are symmetric, within their bits and use them: 1 bit is -1 and 1, b bits reach 2^(b-1) - 1 in absolute value."""
    case = prepared(name)
    for layer, codes in case.adapter.codes(case.module).items():
        bits = case.bits[layer].weight
        assert codes.shape == tuple(case.model.get_submodule(layer).weight.shape)
        assert np.abs(codes).max() == max(2 ** (bits - 1) - 1, 1), layer
        if bits == 1:
            assert set(np.unique(codes)) == {-1, 1}


def test_binary_scale_is_the_mean_magnitude(prepared):
    """Binary weights are the sign times the mean magnitude of the output channel, worked out here by hand."""
    case = prepared("binary")
    layer = case.module.get_submodule("features.0")
    weight = layer.weight.detach()
    expected = torch.where(weight >= 0, 1.0, -1.0) * weight.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(layer.quant_weight().value.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "profile"), [("cnn", "layerwise"), ("residual", "finn"), ("binary", "layerwise")])
def test_fast_run_equals_qonnx(prepared, exported, tmp_path, name, profile):
    """One onnxruntime session gives what qonnx's own node-by-node execution gives."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    case = prepared(name, profile)
    path = exported(name, profile)
    model = cleanup_model(ModelWrapper(str(of_one_image(path, tmp_path))))
    expected = execute_onnx(model, {model.graph.input[0].name: case.example[:1].numpy()})[model.graph.output[0].name]
    np.testing.assert_allclose(
        case.adapter.run(path, case.example[:1])[0], expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


def test_every_width_of_one_layer(tmp_path):
    """A model that is itself a layer takes every weight width 1..8 and activation width 2..8, one after the other."""
    torch.manual_seed(0)
    model, example = torch.nn.Linear(6, 4), torch.randn(5, 6)
    adapter, inventory = BrevitasAdapter(), find_layers(model, example)
    for weight, activation in [(1, 8), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 7), (8, 8)]:
        bits = BitConfig({"weight": Precision(weight, activation)}, inventory.fingerprint)
        module = adapter.prepare(model, bits, example, [example])
        for format in adapter.formats[: 1 if weight == 1 else 2]:
            path = adapter.export(module, tmp_path / f"{weight}.onnx", example, format=format)
            assert adapter.read_bits(path) == bits
            np.testing.assert_array_equal(adapter.read_codes(path)["weight"], adapter.codes(module)["weight"])


def _edited(path, tmp_path, edit):
    model = onnx.load(path)
    edit(model.graph)
    onnx.save(model, tmp_path / "edited.onnx")
    return tmp_path / "edited.onnx"


def _set(graph, name, change):
    tensor = next(item for item in graph.initializer if item.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), name))


class TestTampering:
    def test_bit_width(self, prepared, exported, tmp_path):
        """A changed bit-width input of one Quant node shows in the bits that are read."""
        case = prepared("cnn")
        width = "features.4.weight_quant.tensor_quant.msb_clamp_bit_width_impl.bit_width"
        path = _edited(exported("cnn"), tmp_path, lambda graph: _set(graph, width, lambda value: value + 1))
        found = case.adapter.read_bits(path)
        assert [name for name in found.layers if found[name] != case.bits[name]] == ["features.4"]

    def test_clip(self, prepared, exported, tmp_path):
        """A narrowed Clip range in a QCDQ file shows as fewer bits, and its stored codes no longer fit."""
        case = prepared("cnn")

        def narrow(graph):
            conv = next(node for node in graph.node if node.name == "features.7")
            dequantize = next(node for node in graph.node if conv.input[1] in node.output)
            clip = next(node for node in graph.node if dequantize.input[0] in node.output)
            clip.input[1], clip.input[2] = "low", "high"
            for name, value in (("low", -1), ("high", 1)):
                graph.initializer.append(onnx.numpy_helper.from_array(np.int8(value), name))

        path = _edited(exported("cnn", format="qcdq"), tmp_path, narrow)
        assert (case.bits["features.7"].weight, case.adapter.read_bits(path)["features.7"].weight) == (5, 2)
        with pytest.raises(FormatError, match=r"features\.7 holds codes"):
            case.adapter.read_codes(path)

    def test_weight(self, prepared, exported, tmp_path):
        """One changed weight shows in the codes that are read."""
        case = prepared("cnn")
        path = _edited(exported("cnn"), tmp_path, lambda graph: _set(graph, "fc.weight", lambda value: -value))
        assert not np.array_equal(case.adapter.read_codes(path)["fc"], case.adapter.codes(case.module)["fc"])

    def test_removed_quantizer(self, prepared, exported, tmp_path):
        """A layer whose weight lost its Quant node is named, not passed over."""

        def remove(graph):
            next(node for node in graph.node if node.name == "fc").input[1] = "fc.weight"

        path = _edited(exported("cnn"), tmp_path, remove)
        with pytest.raises(FormatError, match="the weight of fc is not quantized"):
            prepared("cnn").adapter.read_bits(path)

    def test_truncated(self, prepared, exported, tmp_path):
        """A file that was cut off is refused as damaged."""
        whole = exported("cnn").read_bytes()
        (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FormatError):
            prepared("cnn").adapter.read_bits(tmp_path / "cut.onnx")

    def test_missing_and_foreign(self, prepared, tmp_path):
        """A missing file and an ONNX file of another tool are refused with what is wrong."""
        adapter = prepared("cnn").adapter
        with pytest.raises(FormatError, match="does not exist"):
            adapter.read_bits(tmp_path / "none.onnx")
        node = onnx.helper.make_node("Relu", ["x"], ["y"])
        values = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
        onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", values[:1], values[1:])), tmp_path / "f.onnx")
        with pytest.raises(FormatError, match="metadata"):
            adapter.read_bits(tmp_path / "f.onnx")


class TestExport:
    def test_binary_has_no_qcdq(self, prepared, tmp_path):
        """Binary weights are refused for QCDQ by layer name, and nothing is left behind."""
        case = prepared("binary")
        with pytest.raises(AdapterError, match=r"features\.0"):
            case.adapter.export(case.module, tmp_path / "b.onnx", case.example, format="qcdq")
        assert not list(tmp_path.iterdir())

    def test_failure_leaves_the_old_file(self, prepared, tmp_path):
        """An export that fails half-way keeps the file that stood there, and no debris."""
        case = prepared("cnn")
        (tmp_path / "m.onnx").write_bytes(b"old")
        with pytest.raises(AdapterError):
            case.adapter.export(case.module, tmp_path / "m.onnx", (case.example, "not a tensor"))
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.onnx", b"old")]

    def test_leaves_the_module_as_it_was(self, prepared, tmp_path):
        """Exporting a module in training mode changes neither its outputs nor its mode."""
        case = prepared("cnn")
        module = copy.deepcopy(case.module).train()
        case.adapter.export(module, tmp_path / "m.onnx", case.example)
        assert all(child.training for child in (module, module.get_submodule("features.1")))
        np.testing.assert_array_equal(case.outputs(module.eval())[0], case.outputs()[0])

    def test_ir_version(self, exported):
        """Files stay within the ONNX IR version that onnxruntime 1.31 accepts, and list no constants as inputs."""
        model = onnx.load(exported("two-inputs"))
        assert model.ir_version <= 13
        assert [item.name for item in model.graph.input] == ["a", "b"]


def test_costs_equal_qonnx(exported, prepared):
    """BitOps and WeightSize equal qonnx's own inference-cost analysis of the exported file."""
    from mpq_plugins.costs import BitOps, WeightSize

    case = prepared("cnn")
    layers = {layer: case.bits[layer.name] for layer in find_layers(network("cnn"), case.example)}
    found = case.adapter.inference_cost(exported("cnn"))
    assert found.bit_ops == BitOps().total(layers)
    assert found.weight_bits == WeightSize().total(layers) * 8
    assert found.macs == sum(layer.macs for layer in layers)
