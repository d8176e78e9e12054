"""Other bits for a prepared module, in place and at once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas import _finn
from mpq_brevitas._modules import get_layer
from mpq_brevitas._recipe import recipe_of
from mpq_plugins._adapter import attach_bits, bits_of
from mpq_plugins._bits import BitConfig
from mpq_plugins._errors import AdapterError
from mpq_plugins._layers import unknown_layer


def set_bits(module: nn.Module, bits: BitConfig) -> nn.Module:
    """Switch `module` to `bits`; ranges stay, scales follow. Returns the same module.

    Needs `weight_range="max"`: an MSE range depends on the bits it was searched for, so it would have to be searched
    again. Raises `AdapterError` for that, for binary weights and for layers that are not quantized.
    """
    old, recipe = bits_of(module), recipe_of(module)
    if recipe.weight_range != "max":
        raise AdapterError('bits can be switched in place only with weight_range="max". Prepare the module that way.')
    for name, precision in bits.layers.items():
        if name not in old.layers:
            raise unknown_layer(name, list(old.layers))
        if precision.weight != old[name].weight and 1 in (precision.weight, old[name].weight):
            raise AdapterError(f"{name} cannot change between binary and integer weights in place. Prepare again.")
    new = BitConfig({**old.layers, **bits.layers}, bits.fingerprint, bits.origin, bits.costs)
    _set_activations(module, new, recipe.profile)
    for name, precision in bits.layers.items():
        if precision.weight != old[name].weight:
            brevitas.set_weight_bits(get_layer(module, name).weight_quant, precision.weight)
    return attach_bits(module, new)


def _set_activations(module: nn.Module, bits: BitConfig, profile: str) -> None:
    if profile == "finn":
        _finn.set_activation_bits(module, bits)
        return
    layers: Mapping[str, nn.Module] = {name: get_layer(module, name) for name in bits.layers}
    for name, layer in layers.items():
        brevitas.set_activation_bits(layer.input_quant, bits[name].activation)
