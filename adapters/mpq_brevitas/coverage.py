"""Nothing stays in float silently: every layer must hold exactly the bits it was asked for."""

from __future__ import annotations

from torch import nn

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.modules import get_layer
from mpq_plugins.errors import AdapterError
from mpq_plugins.space.bits import BitConfig


def check_weights(module: nn.Module, bits: BitConfig) -> None:
    """Raise `AdapterError` naming the first layer whose weight is not quantized to the asked bits."""
    for name, precision in bits.layers.items():
        layer = get_layer(module, name)
        if not brevitas.is_quantized_layer(layer):
            raise AdapterError(f"{name} was left in float ({type(layer).__name__}). Exclude it from the bit configuration.")
        found = int(layer.weight_quant.bit_width())
        if found != precision.weight:
            raise AdapterError(f"{name} got {found} weight bits instead of {precision.weight}. Report this as a defect.")


def check_inputs(module: nn.Module, bits: BitConfig) -> None:
    """Raise `AdapterError` naming the first layer whose own input quantizer has not the asked bits."""
    for name, precision in bits.layers.items():
        proxy = get_layer(module, name).input_quant
        found = int(proxy.bit_width()) if proxy.is_quant_enabled else None
        if found != precision.activation:
            raise AdapterError(
                f"{name} got {found} activation bits instead of {precision.activation}. Report this as a defect."
            )
