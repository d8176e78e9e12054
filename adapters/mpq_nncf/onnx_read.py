"""Codes and levels in an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_nncf.declaration import CALL, KEY, WEIGHT, Declaration, Found, Levels, json_or_none
from mpq_nncf.onnx_packing import storage_bits
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import FormatError

_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_PASSING = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Flatten MaxPool GlobalMaxPool Split Gather Slice Pad Expand Tile DepthToSpace "
    "SpaceToDepth Relu ReduceMax Identity".split()
)


@dataclass(frozen=True)
class _Graph:
    arrays: Mapping[str, np.ndarray]
    codes: Mapping[str, int]  # constant of signed codes -> bits of its storage
    maker: Mapping[str, Any]
    readers: Mapping[str, list[tuple[Any, int]]]


def read_onnx(path: Path) -> tuple[Declaration | None, dict[str, Found]]:
    """What the file declares, and what it holds by stored name; raises `FormatError`."""
    onnx = require("onnx", "onnx")
    if not path.is_file():
        raise FormatError(f"{path} does not exist. Give the file that export() returned.")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's and onnx's errors have no common base
        raise FormatError(f"{path} is not a complete ONNX file: {str(error)[:200]}. Export it again.") from error
    graph = _graph(onnx, model)
    text = json_or_none(next((item.value for item in model.metadata_props if item.key == KEY), None))
    return None if text is None else Declaration.loads(text, where=str(path)), _found(graph)


def _graph(onnx: Any, model: Any) -> _Graph:
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    codes = {tensor.name: bits for tensor in model.graph.initializer if (bits := storage_bits(onnx, tensor)) is not None}
    maker, readers = {}, {}
    for node in model.graph.node:
        maker.update(dict.fromkeys(node.output, node))
        for index, name in enumerate(node.input):
            readers.setdefault(name, []).append((node, index))
        if node.op_type == "Constant":
            arrays[node.output[0]] = onnx.numpy_helper.to_array(node.attribute[0].t)
    return _Graph(arrays, codes, maker, readers)


def _found(graph: _Graph) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for name, storage in graph.codes.items():
        array = graph.arrays[name].astype(np.int8)
        calls = [call for node, index in graph.readers.get(name, ()) if index == 0 for call in _calls(graph, node)]
        if not calls:
            continue
        holder = name.removesuffix(WEIGHT)
        levels: dict[str, Levels] = {}
        for call in calls:
            user, marked, _ = call.name.rpartition(CALL)
            user = user if marked else holder
            levels[user] = (*levels.get(user, ()), *_levels(graph, call.input[0]))
        found[holder] = Found(array, storage, levels)
    return found


def _calls(graph: _Graph, node: Any) -> Iterator[Any]:
    """The weighted operations that a dequantized constant reaches."""
    if node.op_type not in ("DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze"):
        return
    for reader, index in graph.readers.get(node.output[0], ()):
        if reader.op_type in _WEIGHTED and index == 1:
            yield reader
        elif index == 0:
            yield from _calls(graph, reader)


def _levels(graph: _Graph, name: str) -> Iterator[int | None]:
    node = graph.maker.get(name)
    if node is None:
        yield None
    elif node.op_type == "DequantizeLinear":
        yield _grid_size(graph, node)
    elif node.op_type == "Concat":
        for source in node.input:
            yield from _levels(graph, source)
    elif node.op_type in _PASSING:
        yield from _levels(graph, node.input[0])
    else:
        yield None


def _grid_size(graph: _Graph, node: Any) -> int | None:
    source = graph.maker.get(node.input[0])
    if source is None:
        return None
    if source.op_type == "Clip":
        low, high = (graph.arrays.get(name) for name in source.input[1:3])
        return None if low is None or high is None else int(high) - int(low) + 1
    return 256 if source.op_type == "QuantizeLinear" else None
