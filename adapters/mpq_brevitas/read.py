"""An exported file -> the bits and codes that it really holds, from the file alone."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpq_plugins.adapter.onnx_graph import Array, OnnxGraph
from mpq_plugins.common.files import parse_json
from mpq_plugins.errors import FormatError
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision

METADATA = "mpq"
FORMAT = "mpq-onnx/1"
LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operations that move quantized values without changing them.
_MOVING = frozenset("Cast Concat Flatten Gather Identity MaxPool Reshape Slice Squeeze Transpose Unsqueeze".split())


class BrevitasGraph(OnnxGraph):
    """A loaded ONNX model of this adapter."""

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What the exporter wrote about layers and fingerprint; raises `FormatError` when it is missing."""
        text = self.metadata_text(METADATA)
        try:
            document = None if text is None else parse_json(text, where=str(self.path))
        except FormatError:
            document = None
        if not isinstance(document, dict) or document.get("format") != FORMAT or not document.get("layers"):
            raise FormatError(
                f"{self.path} lacks the {METADATA!r} metadata ({FORMAT}) that names its layers. "
                "Read files as BrevitasAdapter exported them, and another adapter's with that adapter; "
                "other tools' rewrites drop the layer names."
            )
        return document

    def moved_from(self, name: str) -> Any | None:
        """The node that computed the values of tensor `name`, looking through operations that only move them."""
        node = self.producers.get(name)
        while node is not None and (node.op_type in _MOVING or self._pads_with_zeros(node)):
            node = self.producers.get(node.input[0])
        return node

    def _pads_with_zeros(self, node: Any) -> bool:
        """Whether the node pads with zeros or with values that it is given, which are codes already."""
        if node.op_type != "Pad":
            return False
        if any(item.name == "mode" and item.s != b"constant" for item in node.attribute) or len(node.input) < 3:
            return True
        value = self.constant(node.input[2]) if node.input[2] else np.zeros(())
        return value is not None and not np.any(value)

    def calls(self) -> Iterator[tuple[str, Any]]:
        """Layer name and node of every layer call, in order; a second call of `conv` is the node `conv#2`."""
        known = self.metadata["layers"]
        for node in self.model.graph.node:
            if node.op_type in LAYER_OPS:
                name = layer_of_call(node.name, known)
                if name is not None:
                    yield name, node


def call_name(layer: str, number: int, known: Container[str]) -> str:
    """The name of a layer's call by its number from 1: the layer's own for the first, `conv#2` for the second."""
    mark = "#"
    while number > 1 and f"{layer}{mark}{number}" in known:  # another layer has that name
        mark += "#"
    return layer if number == 1 else f"{layer}{mark}{number}"


def layer_of_call(name: str, known: Container[str]) -> str | None:
    """Inverse of `call_name`; None for a node that is no call of a known layer."""
    if name in known:
        return name
    found = re.fullmatch(r"(.*?)#+[0-9]+", name, re.DOTALL)
    while found is not None and found[1] not in known and name[len(found[1])] == "#":
        longer = name[: len(found[1]) + 1]
        found = re.fullmatch(rf"({re.escape(longer)}.*?)#+[0-9]+", name, re.DOTALL)
    return None if found is None or found[1] not in known else found[1]


def attribute(node: Any, name: str, default: int) -> int:
    """An integer attribute of a node."""
    return next((int(item.i) for item in node.attribute if item.name == name), default)


@dataclass(frozen=True)
class Quantizer:
    """Codes from `lowest` to `highest` times `scale`; `source` names the tensor that is quantized.

    In a file with stored integers (QCDQ) `source` is the tensor of codes; `is_stored` says so.
    """

    bits: int
    lowest: int
    highest: int
    signed: bool
    scale: Array
    source: str
    is_stored: bool = False

    def codes(self, values: Array) -> Array:
        """Integer codes of float values (or of stored codes), in the shape of `values`."""
        if self.is_stored:
            return np.clip(values, self.lowest, self.highest).astype(np.int64)
        if self.bits == 1:
            return np.where(values >= 0, 1, -1).astype(np.int64)
        return np.clip(np.round(values / self.scale), self.lowest, self.highest).astype(np.int64)


def read_quantizer(graph: BrevitasGraph, tensor: str) -> Quantizer | None:
    """The quantizer that made `tensor`, looking through moves; None when it is a float value."""
    node = graph.moved_from(tensor)
    if node is None:
        return None
    reader = {"Quant": _quant, "BipolarQuant": _bipolar, "DequantizeLinear": _dequantize}.get(node.op_type)
    return None if reader is None else reader(graph, node)


def _quant(graph: BrevitasGraph, node: Any) -> Quantizer:
    width = graph.value(node.input[3], of=node.name)
    if width.size != 1 or float(width) != int(width) or not 2 <= int(width) <= 32:
        raise FormatError(f"{graph.path}: {node.name} has the bit-width {width.tolist()}, expected a whole number from 2.")
    if np.any(graph.value(node.input[2], of=node.name)):
        raise FormatError(f"{graph.path}: {node.name} has a zero point; this adapter writes symmetric quantizers only.")
    signed, narrow = bool(attribute(node, "signed", 1)), bool(attribute(node, "narrow", 0))
    lowest, highest = integer_range(int(width), signed=signed, narrow=narrow)
    return Quantizer(int(width), lowest, highest, signed, _scale(graph, node), node.input[0])


def _bipolar(graph: BrevitasGraph, node: Any) -> Quantizer:
    return Quantizer(1, -1, 1, True, _scale(graph, node), node.input[0])


def _scale(graph: BrevitasGraph, node: Any) -> Array:
    scale = graph.value(node.input[1], of=node.name)
    if not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        raise FormatError(f"{graph.path}: {node.name} has scales that are not positive numbers. Export it again.")
    return scale


def integer_range(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    """Lowest and highest code, as QONNX defines them."""
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


def _dequantize(graph: BrevitasGraph, node: Any) -> Quantizer:
    zero_point = graph.value(node.input[2], of=node.name)
    if np.any(zero_point):
        raise FormatError(f"{graph.path}: {node.name} has a zero point; this adapter writes symmetric quantizers only.")
    limits = np.iinfo(zero_point.dtype)
    lowest, highest, source = int(limits.min), int(limits.max), node.input[0]
    clip = graph.producers.get(source)
    if clip is not None and clip.op_type == "Clip":
        lowest, highest = (int(graph.value(name, of=clip.name)) for name in clip.input[1:3])
        source = clip.input[0]
    is_stored = graph.constant(source) is not None
    if not is_stored:
        source = graph.producers[source].input[0]
    bits = _width(graph, node.name, lowest, highest)
    return Quantizer(bits, lowest, highest, lowest < 0, _scale(graph, node), source, is_stored)


def _width(graph: BrevitasGraph, name: str, lowest: int, highest: int) -> int:
    """Bits of a code range, which must be one that Brevitas writes."""
    for bits in range(2, 9):
        for narrow in (False, True):
            if (lowest, highest) in (integer_range(bits, signed=s, narrow=narrow) for s in (True, False)):
                return bits
    raise FormatError(f"{graph.path}: {name} clips codes to [{lowest}, {highest}], which is no bit-width. Export it again.")


def read_bits(path: str | Path) -> BitConfig:
    """Bits of every layer, read off the quantizer operations in front of its weight and its input.

    Layer names and fingerprint are in the file's metadata; the bits there (what was asked for) are not looked at.
    """
    graph = BrevitasGraph.load(path)
    found: dict[str, Precision] = {}
    for name, weight, activation in layer_quantizers(graph):
        precision = Precision(weight.bits, activation.bits)
        if found.setdefault(name, precision) != precision:
            raise FormatError(f"{path}: {name} is called with {found[name]} and with {precision}. Export it again.")
    return BitConfig(found, str(graph.metadata.get("fingerprint", "")))


def read_codes(path: str | Path) -> dict[str, np.ndarray]:
    """Integer weight codes of every layer, in the shape of the float weight."""
    graph = BrevitasGraph.load(path)
    return {name: weight_codes(graph, name, weight) for name, weight, _ in layer_quantizers(graph)}


def weight_codes(graph: BrevitasGraph, name: str, weight: Quantizer) -> np.ndarray:
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


def layer_quantizers(graph: BrevitasGraph) -> list[tuple[str, Quantizer, Quantizer]]:
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
