"""QONNX files of the finn profile keep FINN's rules, as far as the file shows them."""

import onnx
import pytest
from mpq_brevitas.read import BrevitasGraph, attribute


def _quantizers(graph):
    return [node for node in graph.model.graph.node if node.op_type == "Quant" and graph.constant(node.input[0]) is None]


@pytest.mark.parametrize("name", ["cnn", "residual"])
class TestRules:
    def test_signs(self, exported, name):
        """Unsigned, non-narrow quantizers stand right behind a ReLU (or its clipped form), signed ones everywhere else."""
        graph = BrevitasGraph.load(exported(name, "finn"))
        assert _quantizers(graph)
        for node in _quantizers(graph):
            producer = graph.producers.get(node.input[0])
            behind_relu = producer is not None and producer.op_type in ("Relu", "Clip")
            assert attribute(node, "signed", 1) == (not behind_relu), node.name
            assert behind_relu <= (attribute(node, "narrow", 0) == 0)

    def test_no_zero_points_and_at_most_eight_bits(self, exported, name):
        """Every zero point is 0 and every activation has 2 to 8 bits."""
        graph = BrevitasGraph.load(exported(name, "finn"))
        for node in _quantizers(graph):
            assert not graph.constant(node.input[2]).any()
            assert 2 <= int(graph.constant(node.input[3])) <= 8

    def test_biases_are_float(self, exported, name):
        """No bias is quantized; FINN puts float biases into thresholds."""
        graph = BrevitasGraph.load(exported(name, "finn"))
        biases = [node.input[2] for _, node in graph.calls() if len(node.input) > 2]
        assert biases
        assert all(graph.constant(bias) is not None for bias in biases)

    def test_normalisation_is_merged(self, exported, name):
        """No batch normalisation is left in the file."""
        graph = BrevitasGraph.load(exported(name, "finn"))
        assert not [node for node in graph.model.graph.node if node.op_type == "BatchNormalization"]


def test_adds_have_equal_scales(exported):
    """Both operands of every residual add come from quantizers with one scale and one bit-width."""
    graph = BrevitasGraph.load(exported("residual", "finn"))
    adds = [node for node in graph.model.graph.node if node.op_type == "Add"]
    assert len(adds) == 2
    for add in adds:
        left, right = (graph.moved_from(name) for name in add.input)
        assert left.op_type == right.op_type == "Quant"
        assert graph.constant(left.input[1]) == graph.constant(right.input[1])
        assert graph.constant(left.input[3]) == graph.constant(right.input[3])


def test_opset(exported):
    """FINN's passes know opset 13."""
    assert {item.version for item in onnx.load(exported("cnn", "finn")).opset_import if not item.domain} == {13}
