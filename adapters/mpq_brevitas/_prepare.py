"""A float model and its bits -> a calibrated quantized module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas import _finn, _layerwise
from mpq_brevitas._calibrate import MergedSite, calibrate, reestimate_merged_norms
from mpq_brevitas._coverage import check_inputs, check_weights
from mpq_brevitas._equalize import equalize
from mpq_brevitas._modules import get_layer, rooted
from mpq_brevitas._options import activation_rule, check_options
from mpq_brevitas._ranges import fit_activations
from mpq_brevitas._recipe import Recipe, attach_recipe
from mpq_brevitas._rounding import check_rounding, originals_kept, round_weights
from mpq_brevitas._support import check_convertible
from mpq_plugins._adapter import attach_bits
from mpq_plugins._batch_norm import AbstractSite, bias_sites, norm_sites, reestimate_batch_norm
from mpq_plugins._bits import BitConfig
from mpq_plugins._discover import find_layers
from mpq_plugins._errors import DataError
from mpq_plugins._layers import Inventory
from mpq_plugins._model import Batch, batches_of
from mpq_plugins._ptq import PTQ
from mpq_plugins._repairs import Judge, Repair, attach_repairs, better, hold_out, repair

if TYPE_CHECKING:
    from mpq_brevitas._adapter import BrevitasAdapter


def prepare(
    model: nn.Module, bits: BitConfig, example: Any, calibration: Iterable[Any], *, adapter: BrevitasAdapter, ptq: PTQ
) -> nn.Module:
    """See `AbstractAdapter.prepare` and `BrevitasAdapter.prepare`."""
    check_options(adapter, ptq)
    inventory = find_layers(model, example)
    check_convertible(model, bits, inventory, adapter.profile, example)
    batches = tuple(batches_of(calibration))
    if not batches:
        raise DataError("no calibration batches were given, but activation ranges need them. Pass data (--data).")
    recipe = _recipe(model, bits, batches, adapter, ptq)
    used, held = hold_out(batches, ptq.held_out)
    judge = Judge(model, held) if held else None

    def repaired(options: PTQ) -> tuple[nn.Module, list[Repair]]:
        return _repaired(model, bits, inventory, batches, used, recipe, options, judge)

    module, repairs = repaired(ptq)
    for option, plain in (("rounding", "nearest"), ("equalization", "none")):
        if judge is not None and getattr(ptq, option) != plain:
            simpler, of_simpler = repaired(replace(ptq, **{option: plain}))
            module, made = better(f"{option}={getattr(ptq, option)}", judge, simpler, module)
            repairs = [*(repairs if made.kept else of_simpler), made]
            ptq = ptq if made.kept else replace(ptq, **{option: plain})
    attach_repairs(attach_recipe(module, recipe), repairs)
    return attach_bits(module.eval(), bits)


def _repaired(
    model: nn.Module,
    bits: BitConfig,
    inventory: Inventory,
    batches: tuple[Batch, ...],
    used: Sequence[Batch],
    recipe: Recipe,
    ptq: PTQ,
    judge: Judge | None,
) -> tuple[nn.Module, list[Repair]]:
    """The module with ranges fitted to `batches`, rounded, and repaired on those of them that are `used`."""
    graph = _convert(model, bits, recipe, batches, ptq)
    module = graph.module
    check_rounding(module, bits, ptq)
    fitted = recipe.activation_range in ("max", "mse")
    calibrate(module, batches[:1] if fitted else batches)
    if fitted:
        fit_activations(module, batches, recipe.activation_range)
    check_weights(module, bits)
    _finn.check_activations(module, bits) if recipe.profile == "finn" else check_inputs(module, bits)
    with originals_kept(module, bits) if ptq.rounding != "nearest" else contextlib.nullcontext():
        round_weights(module, bits, batches, ptq)
    with brevitas.guarded():
        return module, _repairs(graph, bits, inventory, used, recipe, ptq, judge)


def _recipe(model: nn.Module, bits: BitConfig, batches: tuple[Batch, ...], adapter: BrevitasAdapter, ptq: PTQ) -> Recipe:
    is_layerwise = adapter.profile == "layerwise"
    signed = _layerwise.signed_inputs(model, tuple(bits.layers), batches) if is_layerwise else {}
    rule = activation_rule(adapter, ptq)
    return Recipe(adapter.profile, ptq.weight_range, signed, rule, adapter.quantizer, adapter.scales)


def _convert(model: nn.Module, bits: BitConfig, recipe: Recipe, batches: tuple[Batch, ...], ptq: PTQ) -> _finn.Graph:
    """The converted module, per layer the normalisation that was merged into it, and the float network of the same names."""
    if recipe.profile == "layerwise":
        return _finn.Graph(_layerwise.convert(model, bits, recipe), {}, rooted(model))
    equalizer = None if ptq.equalization == "none" else partial(equalize, method=ptq.equalization, batches=batches)
    return _finn.convert(model, bits, recipe, equalizer)


def _repairs(
    graph: _finn.Graph,
    bits: BitConfig,
    inventory: Inventory,
    batches: Sequence[Batch],
    recipe: Recipe,
    ptq: PTQ,
    judge: Judge | None,
) -> list[Repair]:
    module, merged = graph.module, graph.merged
    # Statistics are folded into single channels, which a scale per tensor cannot follow: there only means move.
    per_tensor = recipe.scales == "power-of-two"
    unnormed = {layer.name: layer.kind for layer in inventory if layer.name in bits.layers and not layer.n_norm_parameters}

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
        batches,
        judge,
        reference=graph.reference,
        norms=norms,
        biases=lambda: bias_sites(module, unnormed),
        reestimate=reestimate,
    )
