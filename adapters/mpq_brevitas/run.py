"""Running an exported file with its exact semantics, through one onnxruntime session, and what qonnx counts in it."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_brevitas import internals as brevitas
from mpq_brevitas.read import BrevitasGraph, Quantizer, read_quantizer
from mpq_plugins.adapter.onnx_graph import OnnxGraph, feeds, onnx_session
from mpq_plugins.common.plugins import require


def run(path: str | Path, inputs: Any, *, exact: bool = True) -> list[np.ndarray]:
    """Outputs of the file on `inputs`, one image after the other where the file takes one only.

    QONNX quantizers become Div, Round, Clip, Mul (the formula of the QONNX standard, in float32), so that one session runs
    the whole graph. `exact` is as in `onnx_session`.
    """
    session = onnx_session(standard_onnx(BrevitasGraph.load(path)), exact=exact, extra="brevitas")
    given = feeds([item.name for item in session.get_inputs()], inputs)
    lengths = {item.name: item.shape[0] for item in session.get_inputs() if item.shape}
    n_images = max((len(given[name]) for name, length in lengths.items() if length == 1), default=1)
    pieces = [session.run(None, _image(given, lengths, index, n_images)) for index in range(n_images)]
    return [np.concatenate(outputs) if outputs[0].ndim else np.stack(outputs) for outputs in zip(*pieces, strict=True)]


def _image(feeds: Mapping[str, np.ndarray], lengths: Mapping[str, int], index: int, n_images: int) -> dict[str, np.ndarray]:
    """One image's feeds: inputs that the file holds with a batch axis of one are cut, the others go whole."""
    return {
        name: value[index : index + 1] if lengths.get(name) == 1 and len(value) == n_images else value
        for name, value in feeds.items()
    }


def standard_onnx(graph: BrevitasGraph) -> bytes:
    """The model with `Quant` and `BipolarQuant` spelled in standard operations; weights are quantized beforehand."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    nodes, bounds = [], set()
    for node in graph.model.graph.node:
        if node.op_type not in ("Quant", "BipolarQuant"):
            nodes.append(node)
            continue
        quantizer = read_quantizer(graph, node.output[0])
        assert quantizer is not None  # the node itself is one
        values = graph.constant(quantizer.source)
        if values is None:
            nodes.extend(_spelled(node, quantizer))
            bounds |= {quantizer.lowest, quantizer.highest}
        else:
            quantized = quantizer.codes(values).astype(np.float32) * quantizer.scale
            model.graph.initializer.append(onnx.numpy_helper.from_array(quantized.astype(np.float32), node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for value in sorted(bounds):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(value), _bound(value)))
    kept = [item for item in model.opset_import if item.domain == ""]
    del model.opset_import[:]
    model.opset_import.extend(kept)
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


@dataclass(frozen=True)
class InferenceCost:
    """Bit operations, multiply-accumulates and weight bits of one inference."""

    bit_ops: float
    macs: float
    weight_bits: float


def inference_cost(path: str | Path) -> InferenceCost:
    """What qonnx's analysis finds in a QONNX file, zero weights counted like the others."""
    cost = require("qonnx.util.inference_cost", "brevitas")
    with tempfile.TemporaryDirectory() as folder, brevitas.guarded(), contextlib.redirect_stdout(io.StringIO()):
        total = cost.inference_cost(str(of_one_image(Path(path), Path(folder))), discount_sparsity=False)["total_cost"]
    return InferenceCost(float(total["total_bops"]), float(total["total_macs"]), float(total["total_mem_w_bits"]))


def of_one_image(path: Path, folder: Path) -> Path:
    """The file with a batch of one, as qonnx's analysis needs every size."""
    model = OnnxGraph.load(path).model
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                size.dim_value = 1
    del model.graph.value_info[:]
    target = folder / path.name
    target.write_bytes(model.SerializeToString())
    return target
