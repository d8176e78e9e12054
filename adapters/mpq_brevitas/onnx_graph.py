"""An ONNX file as something that can be walked: constants, producers, quantized layers."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpq_plugins.common.files import parse_json
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import FormatError

METADATA = "mpq"
FORMAT = "mpq-onnx/1"
LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operations that move quantized values without changing them.
_MOVING = (
    "Cast",
    "Concat",
    "Flatten",
    "Gather",
    "Identity",
    "MaxPool",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


@dataclass(frozen=True)
class OnnxGraph:
    """A loaded ONNX model of this adapter."""

    model: Any
    path: Path

    @classmethod
    def load(cls, path: str | Path) -> OnnxGraph:
        """Read a file; raises `FormatError` for one that is damaged or not an ONNX model."""
        onnx = require("onnx", "brevitas")
        path = Path(path)
        try:
            model = onnx.load(path)
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror or error}. Check the path and its permissions.") from error
        except Exception as error:  # protobuf's DecodeError has no importable name of its own
            raise FormatError(
                f"{path} is not a complete ONNX file: {str(error) or type(error).__name__}. Export it again."
            ) from error
        if not model.graph.node:
            raise FormatError(f"{path} holds an ONNX graph without operations. It was cut off; export it again.")
        return cls(model, path)

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Name -> tensor proto of every constant."""
        found = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant":
                found[node.output[0]] = next(item.t for item in node.attribute if item.name == "value")
        return found

    @cached_property
    def producers(self) -> dict[str, Any]:
        """Tensor name -> the node that computes it."""
        return {output: node for node in self.model.graph.node for output in node.output if node.op_type != "Constant"}

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """What the exporter wrote about layers and fingerprint; raises `FormatError` when it is missing."""
        texts = [item.value for item in self.model.metadata_props if item.key == METADATA]
        try:
            document = parse_json(texts[0], where=str(self.path)) if texts else None
        except FormatError:
            document = None
        if not isinstance(document, dict) or document.get("format") != FORMAT or not document.get("layers"):
            raise FormatError(
                f"{self.path} lacks the {METADATA!r} metadata ({FORMAT}) that names its layers. "
                "Read files as BrevitasAdapter exported them, and another adapter's with that adapter; "
                "other tools' rewrites drop the layer names."
            )
        return document

    def constant(self, name: str) -> np.ndarray[Any, Any] | None:
        """The value of a constant, or None when `name` is computed."""
        from onnx import numpy_helper

        tensor = self.constants.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def value(self, name: str, *, of: str) -> np.ndarray[Any, Any]:
        """The value of a constant; raises `FormatError` when it is computed."""
        found = self.constant(name)
        if found is None:
            raise FormatError(f"{self.path}: {of} takes {name!r} as a parameter, which is not a constant. Export it again.")
        return found

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
