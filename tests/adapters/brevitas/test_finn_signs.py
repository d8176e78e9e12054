"""FINN takes unsigned quantizers right behind a ReLU, and only those there: joined ReLUs keep theirs, and their bit."""

import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas.read import BrevitasGraph, attribute
from torch import nn

from mpq_plugins import BitConfig, Precision, build_space, find_layers
from mpq_plugins.errors import AdapterError


class Joined(nn.Module):
    """Two convolutions whose outputs, behind ReLUs or not, are joined and read by a third."""

    def __init__(self, join, second=torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.c = nn.Conv2d(16 if join is _cat else 8, 4, 3)
        self.join, self.second = join, second

    def forward(self, x):
        return self.c(self.join(torch.relu(self.a(x)), self.second(self.b(x))))


class Activated(nn.Module):
    """Two convolutions and something between."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.a, self.activation, self.c = nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.c(self.activation(self.a(x)))


def _cat(left, right):
    return torch.cat([left, right], 1)


def _same(value):
    return value


def _pooled(value):
    return nn.functional.max_pool2d(torch.relu(value), 3, 1, 1)


def _example():
    return torch.randn(8, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def _prepared(model, profile):
    x, inventory = _example(), find_layers(model.eval(), _example())
    bits = BitConfig({layer.name: Precision(8, 2) for layer in inventory}, inventory.fingerprint)
    adapter = BrevitasAdapter(profile=profile)
    return adapter, adapter.prepare(model, bits, x, [x], bias_correction=False)


def _error(model, profile):
    x = _example()
    with torch.no_grad():
        expected = model.eval()(x)
        return float((_prepared(model, profile)[1](x) - expected).abs().mean() / expected.std())


@pytest.mark.parametrize("join", [_cat, torch.add])
@pytest.mark.parametrize("second", [torch.relu, _pooled])
def test_joined_relus_lose_no_bit(join, second):
    """At 2 bits four levels serve what is never negative: no more error than with every layer's own quantizer."""
    model = Joined(join, second)
    assert _error(model, "finn") < 1.05 * _error(model, "layerwise")


@pytest.mark.parametrize("join", [_cat, torch.add])
@pytest.mark.parametrize("second", [torch.relu, _pooled, _same])
def test_signs_of_a_file(join, second, tmp_path):
    """Unsigned right behind a ReLU, signed everywhere else, also where a ReLU is joined with what has both signs."""
    adapter, module = _prepared(Joined(join, second), "finn")
    graph = BrevitasGraph.load(adapter.export(module, tmp_path / "net.onnx", _example()))
    found = {True: 0, False: 0}
    for node in graph.model.graph.node:
        if node.op_type == "Quant" and graph.constant(node.input[0]) is None:
            producer = graph.producers.get(node.input[0])
            behind_relu = producer is not None and producer.op_type == "Relu"
            assert attribute(node, "signed", 1) == (not behind_relu), node.name
            found[behind_relu] += 1
    assert min(found.values()) >= 1


@pytest.mark.parametrize("activation", [nn.Sigmoid(), torch.sigmoid, nn.Hardswish(), nn.functional.gelu])
def test_functions_without_hardware_are_refused_before_scoring(activation):
    """`layers`, `allocate` and `prepare` all ask for what cannot be converted, and are told the function and the layer."""
    model, adapter, x = Activated(activation).eval(), BrevitasAdapter(profile="finn"), _example()
    with pytest.raises(AdapterError, match=r"FINN has no hardware for .* in front of c"):
        adapter.unconvertible(model, find_layers(model, x), x)
    with pytest.raises(AdapterError, match="in front of c"):
        build_space(model, x, adapter=adapter)
    with pytest.raises(AdapterError, match="in front of c"):
        _prepared(model, "finn")


def test_a_function_at_the_end_stays_in_float():
    """A sigmoid that no layer reads is left to the host, without a quantizer."""
    _, module = _prepared(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Sigmoid()), "finn")
    assert any(type(part) is nn.Sigmoid for part in module.modules())
