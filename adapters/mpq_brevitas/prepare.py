"""A float model and its bits -> a calibrated quantized module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas import finn, layerwise
from mpq_brevitas.calibrate import MergedSite, calibrate, reestimate_merged_norms
from mpq_brevitas.coverage import check_inputs, check_weights
from mpq_brevitas.equalize import equalize
from mpq_brevitas.modules import get_layer, rooted
from mpq_brevitas.options import activation_rule, check_options
from mpq_brevitas.ranges import fit_activations, fit_to_inputs
from mpq_brevitas.recipe import Recipe, attach_recipe
from mpq_brevitas.rounding import check_rounding, originals_kept, round_weights
from mpq_brevitas.support import check_convertible
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.repairs import Images, Judge, Repair, attach_repairs, better, repair, to_correct_with
from mpq_plugins.model.discover import find_layers
from mpq_plugins.model.layers import Inventory
from mpq_plugins.model.run import Batch, calibration_batches, device_of
from mpq_plugins.quantizers.batch_norm import AbstractSite, Recorded, bias_sites, norm_sites, recorded, reestimate_batch_norm
from mpq_plugins.quantizers.histogram import Histogram
from mpq_plugins.space.bits import BitConfig

if TYPE_CHECKING:
    from mpq_brevitas.adapter import BrevitasAdapter


def prepare(
    model: nn.Module, bits: BitConfig, example: Any, calibration: Iterable[Any], *, adapter: BrevitasAdapter, ptq: PTQ
) -> nn.Module:
    """See `AbstractAdapter.prepare` and `BrevitasAdapter.prepare`."""
    check_options(adapter, ptq)
    inventory = find_layers(model, example)
    check_convertible(model, bits, inventory, adapter.profile, example)
    batches = tuple(calibration_batches(calibration, example))
    images = Images.of(model, batches, ptq.held_out)
    rule = activation_rule(adapter, ptq)
    recipe = Recipe(adapter.profile, ptq.weight_range, {}, rule, adapter.quantizer, adapter.scales)
    seen = None
    if adapter.profile == "layerwise":
        seen = _observed(model, bits, inventory, images, recipe)
        recipe = replace(recipe, signed={name: bool(histogram.least < 0) for name, histogram in seen.inputs.items()})
    judge = Judge(model, images.quick_held) if images.quick_held else None

    def repaired(options: PTQ) -> tuple[nn.Module, list[Repair]]:
        return _repaired(model, bits, inventory, images, seen, recipe, options, judge)

    module, repairs = repaired(ptq)
    for option, plain in (("rounding", "nearest"), ("equalization", "none")):
        if judge is not None and getattr(ptq, option) != plain:
            simpler, of_simpler = repaired(replace(ptq, **{option: plain}))
            module, made = better(f"{option}={getattr(ptq, option)}", judge, simpler, module)
            repairs = [*(repairs if made.kept else of_simpler), made]
            ptq = ptq if made.kept else replace(ptq, **{option: plain})
    attach_repairs(attach_recipe(module, recipe), repairs)
    return attach_bits(module.eval(), bits)


@dataclass(frozen=True)
class _Observed:
    """What one pass of the float network shows: the inputs of layers, and the moments on the images to repair with."""

    inputs: Mapping[str, Histogram]
    moments: Recorded


def _observed(model: nn.Module, bits: BitConfig, inventory: Inventory, images: Images, recipe: Recipe) -> _Observed:
    network = rooted(model)
    inputs = {name: Histogram(1, len(images.quick)) for name in bits.layers}
    with recorded(network, {**norm_sites(network), **bias_sites(network, _unnormed(bits, inventory))}) as moments:
        layerwise.observe_inputs(network, inputs, images.quick_used)
    layerwise.observe_inputs(network, inputs, images.quick_held)
    return _Observed(inputs, moments)


def _unnormed(bits: BitConfig, inventory: Inventory) -> dict[str, str]:
    return {layer.name: layer.kind for layer in inventory if layer.name in bits.layers and not layer.n_norm_parameters}


def _repaired(
    model: nn.Module,
    bits: BitConfig,
    inventory: Inventory,
    images: Images,
    seen: _Observed | None,
    recipe: Recipe,
    ptq: PTQ,
    judge: Judge | None,
) -> tuple[nn.Module, list[Repair]]:
    """The module with ranges fitted to all `images`, rounded, and repaired on those of them that are used for that."""
    graph = _convert(model, bits, recipe, images.given, ptq)
    module = graph.module.to(device_of(model))  # Brevitas makes its quantizers on the CPU
    check_rounding(module, bits, ptq)
    fitted = recipe.activation_range in ("max", "mse")
    calibrate(module, images.quick[:1] if fitted else images.given)
    if fitted and seen is not None and recipe.quantizer == "uniform":
        fit_to_inputs(module, seen.inputs, recipe.activation_range)
    elif fitted:
        fit_activations(module, images.quick, recipe.activation_range)
    check_weights(module, bits)
    finn.check_activations(module, bits) if recipe.profile == "finn" else check_inputs(module, bits)
    with originals_kept(module, bits) if ptq.rounding != "nearest" else contextlib.nullcontext():
        round_weights(module, bits, images.given, ptq)
    with brevitas.guarded(), brevitas.remembered_weights(get_layer(module, name) for name in bits.layers):
        return module, _repairs(graph, bits, inventory, images, seen, recipe, ptq, judge)


def _convert(model: nn.Module, bits: BitConfig, recipe: Recipe, batches: tuple[Batch, ...], ptq: PTQ) -> finn.Graph:
    """The converted module, per layer the normalisation that was merged into it, and the float network of the same names."""
    if recipe.profile == "layerwise":
        return finn.Graph(layerwise.convert(model, bits, recipe), {}, rooted(model))
    equalizer = None if ptq.equalization == "none" else partial(equalize, method=ptq.equalization, batches=batches)
    return finn.convert(model, bits, recipe, equalizer)


def _repairs(
    graph: finn.Graph,
    bits: BitConfig,
    inventory: Inventory,
    images: Images,
    seen: _Observed | None,
    recipe: Recipe,
    ptq: PTQ,
    judge: Judge | None,
) -> list[Repair]:
    module, merged = graph.module, graph.merged
    # Statistics are folded into single channels, which a scale per tensor cannot follow: there only means move.
    per_tensor = recipe.scales == "power-of-two"
    unnormed, batches = _unnormed(bits, inventory), images.used

    def norms() -> dict[str, AbstractSite]:
        sites: dict[str, AbstractSite] = {**norm_sites(module)}
        if per_tensor:
            return sites | bias_sites(module, {name: inventory[name].kind for name in merged})
        return sites | {name: MergedSite(get_layer(module, name), norm) for name, norm in merged.items()}

    def reestimate() -> None:
        if not per_tensor:
            reestimate_merged_norms(module, merged, batches) if merged else reestimate_batch_norm(module, batches)

    return repair(
        module,
        ptq,
        to_correct_with(images.quick_used, bits),
        judge,
        reference=graph.reference,
        norms=norms,
        biases=lambda: bias_sites(module, unnormed),
        reestimate=reestimate,
        expected=None if seen is None else seen.moments,
    )
