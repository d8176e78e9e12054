"""A float model and its bits -> a calibrated quantized module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas import _finn, _layerwise
from mpq_brevitas._calibrate import calibrate, correct_bias, correctable, reestimate_merged_norms
from mpq_brevitas._coverage import check_inputs, check_weights
from mpq_brevitas._recipe import Profile, Recipe, WeightRange, attach_recipe
from mpq_brevitas._support import check_convertible
from mpq_plugins._adapter import attach_bits
from mpq_plugins._bits import BitConfig
from mpq_plugins._discover import find_layers
from mpq_plugins._errors import DataError
from mpq_plugins._model import batches_of
from mpq_plugins.training import reestimate_batch_norm


def prepare(
    model: nn.Module,
    bits: BitConfig,
    example: Any,
    calibration: Iterable[Any],
    *,
    profile: Profile,
    bias_correction: bool = True,
    bn_reestimation: bool = True,
    weight_range: WeightRange = "mse",
) -> nn.Module:
    """See `AbstractAdapter.prepare` and `BrevitasAdapter.prepare`."""
    inventory = find_layers(model, example)
    check_convertible(model, bits, inventory, profile)
    batches = tuple(batches_of(calibration))
    if not batches:
        raise DataError("no calibration batches were given, but activation ranges need them. Pass data (--data).")
    if profile == "finn":
        recipe = Recipe(profile, weight_range)
        graph = _finn.convert(model, bits, recipe)
        module = graph.module
    else:
        recipe = Recipe(profile, weight_range, _layerwise.signed_inputs(model, tuple(bits.layers), batches))
        module = _layerwise.convert(model, bits, recipe)
    calibrate(module, batches)
    check_weights(module, bits)
    _finn.check_activations(module, bits) if profile == "finn" else check_inputs(module, bits)
    if bn_reestimation and profile == "finn":
        reestimate_merged_norms(module, graph.merged, batches)
    elif bn_reestimation:
        with brevitas.guarded():
            reestimate_batch_norm(module, batches)
    if bias_correction:
        correct_bias(module, correctable(bits, inventory), batches)
    attach_recipe(module, recipe)
    return attach_bits(module.eval(), bits)
