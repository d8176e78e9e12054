"""Other bits for a prepared module, in place and at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas import finn
from mpq_brevitas.modules import get_layer
from mpq_brevitas.ranges import fit_weights, measured, set_thresholds
from mpq_brevitas.recipe import Recipe, recipe_of
from mpq_plugins.adapter.base import attach_bits, bits_of, check_switch
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.run import Batch, batches_of
from mpq_plugins.quantizers.batch_norm import AbstractSite, bias_sites, corrected_around, norm_sites
from mpq_plugins.space.bits import BitConfig

_KINDS = {2: "Linear", 3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}  # by axes of the weight; transposed ones have the same channels


def set_bits(module: nn.Module, bits: BitConfig, calibration: Iterable[Any], batch_norm: str) -> nn.Module:
    """See `AbstractAdapter.set_bits`. Of merged normalisations only means move, by the biases of their layers.

    DuQ's weights keep their learned ranges at any width. Raises `AdapterError` where weights would change between binary
    and integer codes.
    """
    _check(module, bits_of(module), bits, recipe_of(module))
    batches = tuple(batches_of(calibration))
    if bits.layers == bits_of(module).layers or batch_norm == "kept":
        return _switch(module, bits, batches)
    with brevitas.guarded(), corrected_around(module, batches, lambda: _sites(module, bits)):
        return _switch(module, bits, batches)


def _sites(module: nn.Module, bits: BitConfig) -> dict[str, AbstractSite]:
    sites: dict[str, AbstractSite] = {**norm_sites(module)}
    if recipe_of(module).profile == "finn":
        sites.update(bias_sites(module, {name: _KINDS[get_layer(module, name).weight.dim()] for name in bits.layers}))
    return sites


def _switch(module: nn.Module, bits: BitConfig, batches: Sequence[Batch]) -> nn.Module:
    old, recipe = bits_of(module), recipe_of(module)
    reweighted = [name for name, precision in bits.layers.items() if precision.weight != old[name].weight]
    widths = _new_widths(module, bits, recipe)
    thresholds = measured(module, widths, batches, recipe.activation_range) if widths else {}
    for name in reweighted:
        brevitas.set_weight_bits(get_layer(module, name).weight_quant, bits[name].weight)
    for proxy, width in widths.items():
        brevitas.set_activation_bits(proxy, width)
    fit_weights(module, reweighted)
    set_thresholds(thresholds)
    return attach_bits(module, bits)


def _check(module: nn.Module, old: BitConfig, bits: BitConfig, recipe: Recipe) -> None:
    check_switch(old, bits)
    for name, precision in bits.layers.items():
        if precision.weight != old[name].weight and 1 in (precision.weight, old[name].weight):
            raise AdapterError(
                f"{name} cannot change from {old[name].weight} to {precision.weight} weight bits in place: binary weights have "
                "another quantizer. Prepare the model again."
            )
    if recipe.profile == "finn":
        finn.check_agreement(module, bits)


def _new_widths(module: nn.Module, bits: BitConfig, recipe: Recipe) -> dict[Any, int]:
    """The activation quantizers whose width changes, and the width that they get."""
    asked = (
        finn.activation_widths(module, bits)
        if recipe.profile == "finn"
        else {get_layer(module, name).input_quant: precision.activation for name, precision in bits.layers.items()}
    )
    return {proxy: width for proxy, width in asked.items() if brevitas.activation_format(proxy)[0] != width}
