"""ReLU6 in the finn profile keeps its limit, in the module and in the file."""

import onnx
import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas import internals as brevitas
from torch import nn

import mpq_plugins as mpq
from mpq_plugins import BitConfig, Precision, find_layers


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 3)).eval()


def images():
    return 20 * torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("scales", "activation_range"),
    [("float", "mse"), ("float", "max"), ("float", "percentile"), ("power-of-two", "max")],
)
def test_values_above_six_are_cut(net, tmp_path, scales, activation_range):
    """Inputs that drive the activation far above 6 give the float network's outputs, as the module and as the file."""
    adapter, example = BrevitasAdapter("finn", scales=scales), images()
    inventory = find_layers(net, example)
    bits = BitConfig({layer.name: Precision(8, 8) for layer in inventory}, inventory.fingerprint)
    module = adapter.prepare(net, bits, example, [example], activation_range=activation_range, bias_correction=False)
    with torch.no_grad():
        expected = net(example)
        assert (module(example) - expected).abs().mean() < 0.03 * expected.std()
        with brevitas.without_quantization(module):
            torch.testing.assert_close(module(example), expected, rtol=1e-4, atol=1e-4)
    path = adapter.export(module, tmp_path / "m.onnx", example)
    assert mpq.verify(adapter, path, bits, module=module, inputs=example, model=net).ok
    operations = {node.op_type for node in onnx.load(path).graph.node}
    assert ("Clip" in operations) is (scales == "power-of-two")  # 8 is the range of a power of two: the limit stays
