"""A float model and its bits -> a calibrated quantized module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from mpq_brevitas import finn
from mpq_brevitas import internals as brevitas
from mpq_brevitas.convert import convert
from mpq_brevitas.equalize import equalize
from mpq_brevitas.finn import Converted
from mpq_brevitas.groups import rooted
from mpq_brevitas.merged_norms import MergedSite, reestimate_merged_norms
from mpq_brevitas.options import BrevitasOptions, activation_rule, check_options
from mpq_brevitas.ranges import calibrate, fit_activations, fit_to_inputs, observe_inputs
from mpq_brevitas.rounding import check_rounding, originals_kept, round_weights
from mpq_brevitas.support import check_convertible, check_quantized
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.record import record
from mpq_plugins.adapter.remembered import remembered
from mpq_plugins.adapter.repairs import Images, Judge, Repair, keep_what_helps, repair, to_correct_with
from mpq_plugins.model.discover import find_layers
from mpq_plugins.model.run import calibration_batches, device_of
from mpq_plugins.quantizers.batch_norm import AbstractSite, Recorded, bias_sites, norm_sites, recorded, reestimate_batch_norm
from mpq_plugins.quantizers.histogram import Histogram
from mpq_plugins.space.bits import BitConfig


def prepare(
    model: nn.Module, bits: BitConfig, example: Any, calibration: Iterable[Any], options: BrevitasOptions, ptq: PTQ
) -> nn.Module:
    """See `AbstractAdapter.prepare` and `BrevitasAdapter.prepare`; ranges and signs of `options` are still to be found."""
    check_options(options, ptq)
    inventory = find_layers(model, example)
    check_convertible(model, bits, inventory, options.profile, example)
    images = Images.of(model, tuple(calibration_batches(calibration, example)), ptq.held_out)
    options = replace(options, weight_range=ptq.weight_range, activation_range=activation_rule(options, ptq))
    kinds = {layer.name: layer.kind for layer in inventory}
    # What a normalisation reads is centred by its statistics; only the other layers need another bias.
    unnormed = {layer.name: layer.kind for layer in inventory if layer.name in bits.layers and not layer.n_norm_parameters}
    seen = None
    if options.profile == "layerwise":
        seen = _observed(model, bits, unnormed, images)
        options = replace(options, signed={name: bool(histogram.least < 0) for name, histogram in seen.inputs.items()})

    def quantized(ptq: PTQ, judge: Judge | None) -> tuple[nn.Module, list[Repair]]:
        converted = _fitted(model, bits, images, seen, options, ptq)
        layers = map(converted.module.get_submodule, bits.layers)
        with brevitas.guarded(), remembered(layer.weight_quant for layer in layers):
            return converted.module, _repairs(converted, bits, kinds, unnormed, images, seen, options, ptq, judge)

    module, _ = keep_what_helps(model, images, ptq, quantized)
    return attach_bits(record(module.eval(), options=options), bits)


@dataclass(frozen=True)
class _Observed:
    """What one pass of the float network shows: the inputs of layers, and the moments on the images to repair with."""

    inputs: Mapping[str, Histogram]
    moments: Recorded


def _observed(model: nn.Module, bits: BitConfig, unnormed: Mapping[str, str], images: Images) -> _Observed:
    network = rooted(model)
    inputs = {name: Histogram(1, len(images.quick)) for name in bits.layers}
    with recorded(network, {**norm_sites(network), **bias_sites(network, unnormed)}) as moments:
        observe_inputs(network, inputs, images.quick_used)
    observe_inputs(network, inputs, images.quick_held)
    return _Observed(inputs, moments)


def _fitted(
    model: nn.Module, bits: BitConfig, images: Images, seen: _Observed | None, options: BrevitasOptions, ptq: PTQ
) -> Converted:
    """The converted model with ranges fitted to all `images`, and rounded."""
    equalizer = None
    if ptq.equalization != "none":
        equalizer = partial(equalize, method=ptq.equalization, batches=images.given)
    converted = convert(model, bits, options, equalizer)
    module = converted.module.to(device_of(model))  # Brevitas makes its quantizers on the CPU
    check_rounding(module, bits, ptq)
    fitted = options.activation_range in ("max", "mse")
    calibrate(module, images.quick[:1] if fitted else images.given)
    if fitted and seen is not None and options.quantizer == "uniform":
        fit_to_inputs(module, seen.inputs, options.activation_range)
    elif fitted:
        fit_activations(module, images.quick, options.activation_range)
    check_quantized(module, bits, inputs=options.profile == "layerwise")
    if options.profile == "finn":
        finn.check_activations(module, bits)
    with originals_kept(module, bits) if ptq.rounding != "nearest" else contextlib.nullcontext():
        round_weights(module, bits, images.given, ptq)
    return converted


def _repairs(
    converted: Converted,
    bits: BitConfig,
    kinds: Mapping[str, str],
    unnormed: Mapping[str, str],
    images: Images,
    seen: _Observed | None,
    options: BrevitasOptions,
    ptq: PTQ,
    judge: Judge | None,
) -> list[Repair]:
    """Repair the module in place on the images that are used for that."""
    module, merged, batches = converted.module, converted.merged, images.used
    # Statistics are folded into single channels, which a scale per tensor cannot follow: there only means move.
    per_tensor = options.scales == "power-of-two"

    def norms() -> dict[str, AbstractSite]:
        sites: dict[str, AbstractSite] = {**norm_sites(module)}
        if per_tensor:
            return sites | bias_sites(module, {name: kinds[name] for name in merged})
        return sites | {name: MergedSite(module.get_submodule(name), norm) for name, norm in merged.items()}

    def reestimate() -> None:
        if not per_tensor:
            reestimate_merged_norms(module, merged, batches) if merged else reestimate_batch_norm(module, batches)

    return repair(
        module,
        ptq,
        to_correct_with(images.quick_used, bits),
        judge,
        reference=converted.reference,
        norms=norms,
        biases=lambda: bias_sites(module, unnormed),
        reestimate=reestimate,
        expected=None if seen is None else seen.moments,
    )
