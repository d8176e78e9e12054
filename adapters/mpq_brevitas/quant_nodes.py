"""One quantizer of an exported file, whichever operations spell it: `Quant`, `BipolarQuant`, or clipped Q/DQ pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq_brevitas.onnx_graph import OnnxGraph, attribute
from mpq_plugins.errors import FormatError

Array = np.ndarray[Any, Any]


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


def read_quantizer(graph: OnnxGraph, tensor: str) -> Quantizer | None:
    """The quantizer that made `tensor`, looking through moves; None when it is a float value."""
    node = graph.moved_from(tensor)
    if node is None:
        return None
    reader = {"Quant": _quant, "BipolarQuant": _bipolar, "DequantizeLinear": _dequantize}.get(node.op_type)
    return None if reader is None else reader(graph, node)


def _quant(graph: OnnxGraph, node: Any) -> Quantizer:
    width = graph.value(node.input[3], of=node.name)
    if width.size != 1 or float(width) != int(width) or not 2 <= int(width) <= 32:
        raise FormatError(f"{graph.path}: {node.name} has the bit-width {width.tolist()}, expected a whole number from 2.")
    if np.any(graph.value(node.input[2], of=node.name)):
        raise FormatError(f"{graph.path}: {node.name} has a zero point; this adapter writes symmetric quantizers only.")
    signed, narrow = bool(attribute(node, "signed", 1)), bool(attribute(node, "narrow", 0))
    lowest, highest = integer_range(int(width), signed=signed, narrow=narrow)
    return Quantizer(int(width), lowest, highest, signed, _scale(graph, node), node.input[0])


def _bipolar(graph: OnnxGraph, node: Any) -> Quantizer:
    return Quantizer(1, -1, 1, True, _scale(graph, node), node.input[0])


def _scale(graph: OnnxGraph, node: Any) -> Array:
    scale = graph.value(node.input[1], of=node.name)
    if not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        raise FormatError(f"{graph.path}: {node.name} has scales that are not positive numbers. Export it again.")
    return scale


def integer_range(bits: int, *, signed: bool, narrow: bool) -> tuple[int, int]:
    """Lowest and highest code, as QONNX defines them."""
    if signed:
        return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - narrow


def _dequantize(graph: OnnxGraph, node: Any) -> Quantizer:
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


def _width(graph: OnnxGraph, name: str, lowest: int, highest: int) -> int:
    """Bits of a code range, which must be one that Brevitas writes."""
    for bits in range(2, 9):
        for narrow in (False, True):
            if (lowest, highest) in (integer_range(bits, signed=s, narrow=narrow) for s in (True, False)):
                return bits
    raise FormatError(f"{graph.path}: {name} clips codes to [{lowest}, {highest}], which is no bit-width. Export it again.")
