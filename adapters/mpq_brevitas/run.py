"""Running an exported file with its exact semantics, through one onnxruntime session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mpq_brevitas.onnx_graph import OnnxGraph
from mpq_brevitas.quant_nodes import Quantizer, read_quantizer
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import FormatError


def run(path: str | Path, inputs: Any, *, exact: bool = True) -> list[np.ndarray]:
    """Outputs of the file on `inputs`, one image after the other where the file takes one only.

    QONNX quantizers become Div, Round, Clip, Mul (the formula of the QONNX standard, in float32), so that one session runs
    the whole graph. `exact` switches onnxruntime's graph optimisations off: they fuse Q/DQ pairs into kernels that round
    differently.
    """
    ort = require("onnxruntime", "brevitas")
    graph = OnnxGraph.load(path)
    options = ort.SessionOptions()
    if exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(standard_onnx(graph), options, providers=["CPUExecutionProvider"])
    feeds = _feeds([item.name for item in session.get_inputs()], inputs)
    lengths = {item.name: item.shape[0] for item in session.get_inputs() if item.shape}
    n_images = max((len(feeds[name]) for name, length in lengths.items() if length == 1), default=1)
    pieces = [session.run(None, _image(feeds, lengths, index, n_images)) for index in range(n_images)]
    return [np.concatenate(outputs) if outputs[0].ndim else np.stack(outputs) for outputs in zip(*pieces, strict=True)]


def _feeds(names: list[str], inputs: Any) -> dict[str, np.ndarray]:
    values = inputs if isinstance(inputs, Mapping) else dict(zip(names, _sequence(inputs), strict=False))
    if set(values) != set(names):
        raise FormatError(f"the file takes the inputs {', '.join(names)}, not {', '.join(map(str, values))}.")
    return {name: _array(values[name]) for name in names}


def _sequence(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _image(feeds: Mapping[str, np.ndarray], lengths: Mapping[str, int], index: int, n_images: int) -> dict[str, np.ndarray]:
    """One image's feeds: inputs that the file holds with a batch axis of one are cut, the others go whole."""
    return {
        name: value[index : index + 1] if lengths.get(name) == 1 and len(value) == n_images else value
        for name, value in feeds.items()
    }


def standard_onnx(graph: OnnxGraph) -> bytes:
    """The model with `Quant` and `BipolarQuant` spelled in standard operations; weights are quantized beforehand."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    nodes = []
    for node in graph.model.graph.node:
        if node.op_type not in ("Quant", "BipolarQuant"):
            nodes.append(node)
            continue
        quantizer = read_quantizer(graph, node.output[0])
        assert quantizer is not None  # the node itself is one
        values = graph.constant(quantizer.source)
        if values is None:
            nodes.extend(_spelled(node, quantizer))
        else:
            quantized = quantizer.codes(values).astype(np.float32) * quantizer.scale
            model.graph.initializer.append(onnx.numpy_helper.from_array(quantized.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    if any(node.op_type in ("Quant", "BipolarQuant") for node in graph.model.graph.node):
        _add_ranges(graph, model)
        _drop_domains(model)
    return bytes(model.SerializeToString())


def _spelled(node: Any, quantizer: Quantizer) -> list[Any]:
    from onnx import helper

    name, source, scale = node.output[0], node.input[0], node.input[1]
    divided, rounded, clipped = (f"{name}/{step}" for step in ("divided", "rounded", "clipped"))
    return [
        helper.make_node("Div", [source, scale], [divided]),
        helper.make_node("Round", [divided], [rounded]),  # half to even, as torch
        helper.make_node("Clip", [rounded, _bound(quantizer.lowest), _bound(quantizer.highest)], [clipped]),
        helper.make_node("Mul", [clipped, scale], [name]),
    ]


def _bound(value: int) -> str:
    return f"mpq/bound/{value}"


def _add_ranges(graph: OnnxGraph, model: Any) -> None:
    from onnx import numpy_helper

    bounds: set[int] = set()
    for node in graph.model.graph.node:
        if node.op_type == "Quant":
            quantizer = read_quantizer(graph, node.output[0])
            assert quantizer is not None  # the node itself is one
            bounds |= {quantizer.lowest, quantizer.highest}
    for value in sorted(bounds):
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), _bound(value)))


def _drop_domains(model: Any) -> None:
    kept = [item for item in model.opset_import if item.domain == ""]
    del model.opset_import[:]
    model.opset_import.extend(kept)
