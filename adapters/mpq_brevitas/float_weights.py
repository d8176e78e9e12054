"""Weights left unquantized for a while, as training does that lowers activations first."""

from __future__ import annotations

from torch import nn

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.modules import get_layer
from mpq_brevitas.ranges import restart_weights
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.errors import AdapterError


def use_float_weights(module: nn.Module, on: bool) -> nn.Module:
    """Pass the weights of quantized layers as they are, or quantize them again, with ranges for what they have become."""
    layers = {name: get_layer(module, name) for name in bits_of(module).layers}
    beginning = [name for name, layer in layers.items() if not on and not brevitas.is_quantized_layer(layer)]
    for layer in layers.values():
        brevitas.set_weight_quantization(layer, not on)
    restart_weights(module, beginning)
    return module


def check_quantized_weights(module: nn.Module) -> nn.Module:
    """The module itself; refuses one whose weights are left unquantized: it has no weight codes."""
    for name in bits_of(module).layers:
        if not brevitas.is_quantized_layer(get_layer(module, name)):
            raise AdapterError(
                f"the weight of {name} is left unquantized, so it has no codes. Call use_float_weights(module, False) first."
            )
    return module
