"""A float model and its bits -> a calibrated quantized module."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas import _finn, _layerwise
from mpq_brevitas._calibrate import calibrate, correct_bias, correctable, reestimate_merged_norms
from mpq_brevitas._coverage import check_inputs, check_weights
from mpq_brevitas._equalize import equalize
from mpq_brevitas._options import activation_rule, check_options
from mpq_brevitas._ranges import fit_activations
from mpq_brevitas._recipe import Recipe, attach_recipe
from mpq_brevitas._rounding import check_rounding, originals_kept, round_weights
from mpq_brevitas._support import check_convertible
from mpq_plugins._adapter import attach_bits
from mpq_plugins._bits import BitConfig
from mpq_plugins._discover import find_layers
from mpq_plugins._errors import DataError
from mpq_plugins._layers import Inventory
from mpq_plugins._model import Batch, batches_of
from mpq_plugins._ptq import PTQ
from mpq_plugins.training import reestimate_batch_norm

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
    module, merged = _convert(model, bits, recipe, batches, ptq)
    check_rounding(module, bits, ptq)
    calibrate(module, batches)
    if recipe.activation_range in ("max", "mse"):
        fit_activations(module, batches, recipe.activation_range)
    check_weights(module, bits)
    _finn.check_activations(module, bits) if adapter.profile == "finn" else check_inputs(module, bits)
    with originals_kept(module, bits) if ptq.rounding != "nearest" else contextlib.nullcontext():
        round_weights(module, bits, batches, ptq)
        _repair(module, merged, bits, inventory, batches, recipe, ptq)
    attach_recipe(module, recipe)
    return attach_bits(module.eval(), bits)


def _recipe(model: nn.Module, bits: BitConfig, batches: tuple[Batch, ...], adapter: BrevitasAdapter, ptq: PTQ) -> Recipe:
    is_layerwise = adapter.profile == "layerwise"
    signed = _layerwise.signed_inputs(model, tuple(bits.layers), batches) if is_layerwise else {}
    rule = activation_rule(adapter, ptq)
    return Recipe(adapter.profile, ptq.weight_range, signed, rule, adapter.quantizer, adapter.scales)


def _convert(
    model: nn.Module, bits: BitConfig, recipe: Recipe, batches: tuple[Batch, ...], ptq: PTQ
) -> tuple[nn.Module, Mapping[str, nn.Module]]:
    """The converted module, and per layer the normalisation that was merged into it."""
    if recipe.profile == "layerwise":
        return _layerwise.convert(model, bits, recipe), {}
    equalizer = None if ptq.equalization == "none" else partial(equalize, method=ptq.equalization, batches=batches)
    graph = _finn.convert(model, bits, recipe, equalizer)
    return graph.module, graph.merged


def _repair(
    module: nn.Module,
    merged: Mapping[str, nn.Module],
    bits: BitConfig,
    inventory: Inventory,
    batches: tuple[Batch, ...],
    recipe: Recipe,
    ptq: PTQ,
) -> None:
    # New statistics are folded into single channels, which a scale per tensor cannot follow: there only biases are corrected.
    per_tensor = recipe.scales == "power-of-two"
    if ptq.bn_reestimation and not per_tensor:
        with brevitas.guarded():
            reestimate_merged_norms(module, merged, batches) if merged else reestimate_batch_norm(module, batches)
    if ptq.bias_correction:
        correct_bias(module, correctable(bits, inventory, normed=per_tensor), batches)
