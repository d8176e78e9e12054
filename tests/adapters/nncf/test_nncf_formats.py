"""Names of files, and ONNX with weights in ONNX's own types of few bits."""

import onnx
import pytest
import torch
from mpq_nncf import NNCFAdapter
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify
from mpq_plugins.errors import AdapterError

WIDTHS = {"0": 2, "2": 3, "5": 4, "7": 5}


@pytest.fixture(scope="module")
def prepared():
    """A convolution, a depthwise one and two linear layers with odd numbers of weights, at 2, 3, 4 and 5 bits."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(7, 7, 3, groups=7)
    images = (nn.Conv2d(3, 7, 3), nn.ReLU(), depthwise, nn.AdaptiveAvgPool2d(4), nn.Flatten())
    net = nn.Sequential(*images, nn.Linear(112, 33), nn.ReLU(), nn.Linear(33, 5)).eval()
    x = torch.randn(4, 3, 12, 12)
    bits = BitConfig({name: Precision(width, 8) for name, width in WIDTHS.items()}, find_layers(net, x).fingerprint)
    return bits, NNCFAdapter().prepare(net, bits, x, [x]), x


def test_packed_weights(prepared, tmp_path):
    """Types by width, less bytes of codes, codes read back equal, and outputs equal to the module's."""
    bits, module, x = prepared
    adapter = NNCFAdapter()
    path = adapter.export(module, tmp_path / "net.onnx", x, format="onnx-compact")
    model = onnx.load(path)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("/weight")}
    names = {name: onnx.TensorProto.DataType.Name(kind) for name, kind in kinds.items()}
    has_two_bits = next(item.version for item in model.opset_import if not item.domain) >= 25
    expected = {"0/weight": "INT2" if has_two_bits else "INT4", "2/weight": "INT4", "5/weight": "INT4", "7/weight": "INT8"}
    assert names == expected
    sizes = {tensor.name: len(tensor.raw_data) for tensor in model.graph.initializer}
    assert sizes["5/weight"] == 112 * 33 // 2
    assert sizes["0/weight"] == -(-7 * 3 * 9 // (4 if has_two_bits else 2))
    assert adapter.read_bits(path) == bits
    report = verify(adapter, path, bits, module=module, inputs=x, tolerance=1e-5).check()
    assert report.outputs.batch_sizes == (4, 1)
    assert sum(check.n_codes for check in report.layers) == sum(values.size for values in adapter.codes(module).values())


def test_a_runtime_without_the_types_is_told(prepared, tmp_path, monkeypatch):
    """Where onnxruntime loads neither type nothing is written, and the next step is named; INT4 alone is used without INT2."""
    _, module, x = prepared
    loadable = __import__("mpq_nncf.onnx_packing", fromlist=["_"])
    original = loadable._loadable

    def without(*names):
        def load(onnx, model, chosen):
            if {kind.name for kind in chosen.values()} & set(names):
                raise RuntimeError("type not supported")
            return original(onnx, model, chosen)

        monkeypatch.setattr(loadable, "_loadable", load)

    without("INT2")
    path = NNCFAdapter().export(module, tmp_path / "four.onnx", x, format="onnx-compact")
    assert {item.version for item in onnx.load(path).opset_import if not item.domain} == {21}
    without("INT2", "INT4")
    with pytest.raises(
        AdapterError, match=r"does not load this model with weights in 4 bits: RuntimeError: type not supp.*. Export to onnx"
    ):
        NNCFAdapter().export(module, tmp_path / "none.onnx", x, format="onnx-compact")
    assert not (tmp_path / "none.onnx").exists()


@pytest.mark.parametrize(("name", "format"), [("net.onnx", None), ("net.xml", "onnx"), ("net.bin", "openvino-fast")])
def test_a_name_of_another_format_is_refused(prepared, tmp_path, name, format):
    """The suffix is not changed behind the user's back; a name without one gets the format's."""
    _, module, x = prepared
    with pytest.raises(AdapterError, match=rf"{name} is no name for a file of format .* Name it net\."):
        NNCFAdapter().export(module, tmp_path / name, x, format=format)
    assert not list(tmp_path.iterdir())
