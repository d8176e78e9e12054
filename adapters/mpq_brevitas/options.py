"""Which options of post-training quantization go with which options of the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpq_plugins.adapter.ptq import PTQ, ActivationRange
from mpq_plugins.errors import AdapterError

if TYPE_CHECKING:
    from mpq_brevitas.adapter import BrevitasAdapter


def activation_rule(adapter: BrevitasAdapter, ptq: PTQ) -> ActivationRange:
    """The rule for activation ranges that "default" stands for: least squared error wherever the adapter's scales allow it."""
    if ptq.activation_range != "default" or adapter.quantizer == "duq":
        return ptq.activation_range
    return "percentile" if adapter.scales == "power-of-two" else "mse"


def check_options(adapter: BrevitasAdapter, ptq: PTQ) -> None:
    """Raise `AdapterError` for what cannot be combined, with the reason."""
    if ptq.equalization != "none" and adapter.profile == "layerwise":
        raise AdapterError(
            f'equalization="{ptq.equalization}" moves factors through the traced graph from one layer into the next. '
            'Use profile="finn", or equalization="none".'
        )
    if adapter.scales == "power-of-two" and ptq.activation_range == "mse":
        raise AdapterError(
            'activation_range="mse" finds scales that are no powers of two. Use "percentile" or "max" with '
            'scales="power-of-two".'
        )
    if adapter.quantizer != "duq":
        return
    refused = {
        "weight_range": (ptq.weight_range == "max", "its weights start at 0.9 of the largest magnitude"),
        "activation_range": (ptq.activation_range != "default", "its activations start at the 95th percentile"),
        "rounding": (ptq.rounding != "nearest", "its codes depend on its clip, not on the scale that rounding methods use"),
    }
    for name, (is_refused, why) in refused.items():
        if is_refused:
            raise AdapterError(f'quantizer="duq" does not take {name}={getattr(ptq, name)!r}: {why}. Leave {name} out.')
