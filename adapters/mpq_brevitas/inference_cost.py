"""qonnx's own count of operations and weight bits: an opinion that shares no code with this package."""

from __future__ import annotations

import contextlib
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.onnx_graph import OnnxGraph
from mpq_plugins.common.plugins import require


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
