"""qonnx's own count of operations and weight bits: an opinion that shares no code with this package."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_plugins._plugins import require


@dataclass(frozen=True)
class InferenceCost:
    """Bit operations, multiply-accumulates and weight bits of one inference."""

    bit_ops: float
    macs: float
    weight_bits: float


def inference_cost(path: str | Path) -> InferenceCost:
    """What qonnx's analysis finds in a QONNX file, zero weights counted like the others."""
    cost = require("qonnx.util.inference_cost", "brevitas")
    with brevitas.guarded(), contextlib.redirect_stdout(io.StringIO()):
        total = cost.inference_cost(str(path), discount_sparsity=False)["total_cost"]
    return InferenceCost(float(total["total_bops"]), float(total["total_macs"]), float(total["total_mem_w_bits"]))
