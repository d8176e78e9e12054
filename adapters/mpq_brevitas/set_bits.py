"""Other bits for a prepared module, or its weights left unquantized for a while, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mpq_brevitas import finn
from mpq_brevitas import internals as brevitas
from mpq_brevitas.options import BrevitasOptions, options_of
from mpq_brevitas.ranges import fit_weights, measured, restart_weights, set_thresholds
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
    _check(module, bits_of(module), bits, options_of(module))
    batches = tuple(batches_of(calibration))
    if bits.layers == bits_of(module).layers or batch_norm == "kept":
        return _switch(module, bits, batches)
    with brevitas.guarded(), corrected_around(module, batches, lambda: _sites(module, bits)):
        return _switch(module, bits, batches)


def _sites(module: nn.Module, bits: BitConfig) -> dict[str, AbstractSite]:
    sites: dict[str, AbstractSite] = {**norm_sites(module)}
    if options_of(module).profile == "finn":
        sites.update(bias_sites(module, {name: _KINDS[module.get_submodule(name).weight.dim()] for name in bits.layers}))
    return sites


def _switch(module: nn.Module, bits: BitConfig, batches: Sequence[Batch]) -> nn.Module:
    old, options = bits_of(module), options_of(module)
    reweighted = [name for name, precision in bits.layers.items() if precision.weight != old[name].weight]
    widths = _new_widths(module, bits, options)
    thresholds = measured(module, widths, batches, options.activation_range) if widths else {}
    for name in reweighted:
        brevitas.set_weight_bits(module.get_submodule(name).weight_quant, bits[name].weight)
    for proxy, width in widths.items():
        brevitas.set_activation_bits(proxy, width)
    fit_weights(module, reweighted)
    set_thresholds(thresholds)
    return attach_bits(module, bits)


def _check(module: nn.Module, old: BitConfig, bits: BitConfig, options: BrevitasOptions) -> None:
    check_switch(old, bits)
    for name, precision in bits.layers.items():
        if precision.weight != old[name].weight and 1 in (precision.weight, old[name].weight):
            raise AdapterError(
                f"{name} cannot change from {old[name].weight} to {precision.weight} weight bits in place: binary weights have "
                "another quantizer. Prepare the model again."
            )
    if options.profile == "finn":
        finn.activation_widths(module, bits)  # raises where layers disagree


def _new_widths(module: nn.Module, bits: BitConfig, options: BrevitasOptions) -> dict[Any, int]:
    """The activation quantizers whose width changes, and the width that they get."""
    asked = (
        finn.activation_widths(module, bits)
        if options.profile == "finn"
        else {module.get_submodule(name).input_quant: precision.activation for name, precision in bits.layers.items()}
    )
    return {proxy: width for proxy, width in asked.items() if brevitas.activation_format(proxy)[0] != width}


def use_float_weights(module: nn.Module, on: bool) -> nn.Module:
    """Pass the weights of quantized layers as they are, or quantize them again, with ranges for what they have become."""
    layers = {name: module.get_submodule(name) for name in bits_of(module).layers}
    beginning = [name for name, layer in layers.items() if not on and not brevitas.is_quantized_layer(layer)]
    for layer in layers.values():
        brevitas.set_weight_quantization(layer, not on)
    restart_weights(module, beginning)
    return module
