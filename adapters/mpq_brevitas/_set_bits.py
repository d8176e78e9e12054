"""Other bits for a prepared module, in place and at once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas import _finn
from mpq_brevitas._modules import get_layer
from mpq_brevitas._ranges import fit_activations, fit_weights
from mpq_brevitas._recipe import Recipe, recipe_of
from mpq_plugins._adapter import attach_bits, bits_of
from mpq_plugins._bits import BitConfig
from mpq_plugins._errors import AdapterError, FingerprintError
from mpq_plugins._layers import unknown_layer
from mpq_plugins._model import batches_of


def set_bits(module: nn.Module, bits: BitConfig, calibration: Iterable[Any] = ()) -> nn.Module:
    """See `AbstractAdapter.set_bits`. `bits` may name some of the layers only; the others keep theirs.

    Raises `AdapterError` where weights would change between binary and integer codes.
    """
    old, recipe = bits_of(module), recipe_of(module)
    new = _merged(module, old, bits, recipe)
    switched = [name for name, precision in new.layers.items() if precision.weight != old[name].weight]
    for name in switched:
        brevitas.set_weight_bits(get_layer(module, name).weight_quant, new[name].weight)
    _set_activations(module, new, recipe)
    fit_weights(module, switched)
    batches = tuple(batches_of(calibration))
    if batches:
        fit_activations(module, batches, recipe.activation_range)
    return attach_bits(module, new)


def _merged(module: nn.Module, old: BitConfig, bits: BitConfig, recipe: Recipe) -> BitConfig:
    """The bits of every layer after the switch; refuses what cannot be done."""
    if bits.fingerprint and old.fingerprint and bits.fingerprint != old.fingerprint:
        raise FingerprintError(
            f"the bits are for a model with fingerprint {bits.fingerprint[:19]}..., the module was prepared from one with "
            f"{old.fingerprint[:19]}.... Give bits of the same model."
        )
    for name, precision in bits.layers.items():
        if name not in old.layers:
            raise unknown_layer(name, list(old.layers))
        if precision.weight != old[name].weight and 1 in (precision.weight, old[name].weight):
            raise AdapterError(f"{name} cannot change between binary and integer weights in place. Prepare again.")
    new = BitConfig({**old.layers, **bits.layers}, old.fingerprint, bits.origin, bits.costs)
    if recipe.profile == "finn":
        _finn.check_agreement(module, new)
    return new


def _set_activations(module: nn.Module, bits: BitConfig, recipe: Recipe) -> None:
    if recipe.profile == "finn":
        _finn.set_activation_bits(module, bits)
        return
    for name, precision in bits.layers.items():
        brevitas.set_activation_bits(get_layer(module, name).input_quant, precision.activation)
