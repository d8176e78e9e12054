"""What NNCF has of the common vocabulary of post-training quantization, and what a module remembers of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.record import record, recorded_fact
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.layers import Layer


def check_supported(ptq: PTQ, layers: Sequence[Layer]) -> None:
    """Raise `AdapterError` for what NNCF's torch backend lacks."""
    if ptq.rounding != "nearest":
        raise AdapterError(
            f"NNCF has no rounding={ptq.rounding!r} for torch modules: its GPTQ belongs to weight-only compression of OpenVINO "
            "models. Use the Brevitas adapter (--adapter brevitas), or rounding='nearest'."
        )
    if ptq.equalization == "cross-layer":
        raise AdapterError(
            "NNCF's cross-layer equalization (channel alignment) works on OpenVINO models only, not on torch modules. "
            "Use the Brevitas adapter (--adapter brevitas), or equalization='none'."
        )
    if ptq.equalization == "smooth-quant" and not any(layer.kind == "Linear" for layer in layers):
        raise AdapterError(
            "NNCF's SmoothQuant moves ranges into linear layers only, and no layer with bits is one. "
            "Use equalization='none', or the Brevitas adapter (--adapter brevitas)."
        )


def attach_ptq(module: nn.Module, ptq: PTQ) -> nn.Module:
    """Let a quantized module remember how its ranges are fitted; deepcopy keeps it."""
    return record(module, ptq=ptq)


def ptq_of(module: nn.Module) -> PTQ:
    """How the module's ranges are fitted; the defaults for checkpoints older than this record."""
    return recorded_fact(module, "ptq") or PTQ()


def to_json(ptq: PTQ) -> str:
    """The options as JSON text."""
    return json.dumps(asdict(ptq))


def from_json(text: str) -> PTQ:
    """Inverse of `to_json`; raises `AdapterError` for options that do not exist."""
    options: dict[str, Any] = json.loads(text)
    return PTQ.of(options)
