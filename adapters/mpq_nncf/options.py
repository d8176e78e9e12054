"""The options of a module's quantizers, and which options of post-training quantization NNCF has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.layers import Layer


@final
@dataclass(frozen=True)
class NNCFOptions:
    """The options of the adapter that are part of a module; see `NNCFAdapter`."""

    merge_branches: bool = True
    asymmetric: bool = False


def check_options(ptq: PTQ, layers: Iterable[Layer]) -> None:
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
