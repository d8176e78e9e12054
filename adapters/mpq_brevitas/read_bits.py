"""An exported file -> the bits it really holds, from the file alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpq_brevitas.onnx_graph import OnnxGraph
from mpq_brevitas.quant_nodes import Quantizer, read_quantizer
from mpq_plugins.errors import FormatError
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision


def read_bits(path: str | Path) -> BitConfig:
    """Bits of every layer, read off the quantizer operations in front of its weight and its input.

    Layer names and fingerprint are in the file's metadata; the bits there (what was asked for) are not looked at.
    """
    graph = OnnxGraph.load(path)
    found: dict[str, Precision] = {}
    for name, weight, activation in layer_quantizers(graph):
        precision = Precision(weight.bits, activation.bits)
        if found.setdefault(name, precision) != precision:
            raise FormatError(f"{path}: {name} is called with {found[name]} and with {precision}. Export it again.")
    return BitConfig(found, str(graph.metadata.get("fingerprint", "")))


def read_codes(path: str | Path) -> dict[str, np.ndarray]:
    """Integer weight codes of every layer, in the shape of the float weight."""
    graph = OnnxGraph.load(path)
    return {name: weight_codes(graph, name, weight) for name, weight, _ in layer_quantizers(graph)}


def weight_codes(graph: OnnxGraph, name: str, weight: Quantizer) -> np.ndarray:
    """Integer codes of a layer's weight; raises `FormatError` for codes outside the quantizer's range."""
    values = graph.value(weight.source, of=name)
    expected = tuple(graph.metadata["layers"][name]["weight_shape"])
    if values.shape != expected:
        raise FormatError(f"{graph.path}: the weight of {name} has shape {values.shape}, expected {expected}.")
    if weight.is_stored and (values.min(initial=0) < weight.lowest or values.max(initial=0) > weight.highest):
        raise FormatError(
            f"{graph.path}: the weight of {name} holds codes from {values.min()} to {values.max()}, outside the "
            f"[{weight.lowest}, {weight.highest}] of its {weight.bits} bits. Export it again."
        )
    return weight.codes(values)


def layer_quantizers(graph: OnnxGraph) -> list[tuple[str, Quantizer, Quantizer]]:
    """Layer name, weight quantizer and input quantizer of every layer call; raises `FormatError` for float ones."""
    found = []
    for name, node in graph.calls():
        weight, activation = read_quantizer(graph, node.input[1]), read_quantizer(graph, node.input[0])
        for what, quantizer in (("weight", weight), ("input", activation)):
            if quantizer is None:
                raise FormatError(f"{graph.path}: the {what} of {name} is not quantized. Export it again.")
        found.append((name, weight, activation))
    missing = sorted(set(graph.metadata["layers"]) - {name for name, _, _ in found})
    if missing:
        raise FormatError(f"{graph.path} lacks the layers {', '.join(missing)} that its metadata names. Export it again.")
    return found
