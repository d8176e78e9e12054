"""Codes and levels in an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mpq_nncf.declaration import KEY, WEIGHT, Declaration, Found, declared_in, levels_by_user
from mpq_nncf.onnx_packing import storage_bits
from mpq_plugins.adapter.onnx_graph import OnnxGraph

_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul"))
_PASSING = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Flatten MaxPool GlobalMaxPool Split Gather Slice Pad Expand Tile DepthToSpace "
    "SpaceToDepth Relu ReduceMax Identity".split()
)


def read_onnx(path: Path) -> tuple[Declaration | None, dict[str, Found]]:
    """What the file declares, and what it holds by stored name; raises `FormatError`."""
    graph = OnnxGraph.load(path, check=True)
    return declared_in(graph.metadata_text(KEY), path), _found(graph)


def _found(graph: OnnxGraph) -> dict[str, Found]:
    found: dict[str, Found] = {}
    for name, tensor in graph.constants.items():
        storage = storage_bits(tensor)
        if storage is None:
            continue
        calls = [call for node, index in graph.readers.get(name, ()) if index == 0 for call in _calls(graph, node)]
        if not calls:
            continue
        holder = name.removesuffix(WEIGHT)
        levels = levels_by_user(holder, [(call.name, tuple(_levels(graph, call.input[0]))) for call in calls])
        found[holder] = Found(graph.value(name, of=holder).astype(np.int8), storage, levels)
    return found


def _calls(graph: OnnxGraph, node: Any) -> Iterator[Any]:
    """The weighted operations that a dequantized constant reaches."""
    if node.op_type not in ("DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze"):
        return
    for reader, index in graph.readers.get(node.output[0], ()):
        if reader.op_type in _WEIGHTED and index == 1:
            yield reader
        elif index == 0:
            yield from _calls(graph, reader)


def _levels(graph: OnnxGraph, name: str) -> Iterator[int | None]:
    node = graph.producers.get(name)
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


def _grid_size(graph: OnnxGraph, node: Any) -> int | None:
    source = graph.producers.get(node.input[0])
    if source is None:
        return None
    if source.op_type == "Clip":
        low, high = (graph.constant(name) for name in source.input[1:3])
        return None if low is None or high is None else int(high) - int(low) + 1
    return 256 if source.op_type == "QuantizeLinear" else None
