"""From a float model and its bits to a quantized module."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_nncf import _nncf_quantizers as nncf_quantizers
from mpq_nncf import _nncf_setup as nncf_setup
from mpq_nncf._activation_range import fit, measured, unquantized
from mpq_nncf._advice import check_precision
from mpq_nncf._groups import check_groups, check_tied_weights, others, planned, shared_inputs, traced_copy
from mpq_nncf._hookable import as_hookable
from mpq_nncf._ptq import attach_ptq, check_supported
from mpq_nncf._quiet import quiet
from mpq_nncf._set_bits import first_places
from mpq_nncf._weight_range import fit_weight_ranges
from mpq_nncf._wiring import Wiring, attach_wiring, calls_of, find_wiring, owners
from mpq_plugins._adapter import attach_bits
from mpq_plugins._bits import BitConfig
from mpq_plugins._discover import find_layers
from mpq_plugins._errors import DataError
from mpq_plugins._model import batch_size, batches_of, device_of, evaluating, to_device
from mpq_plugins._precision import Precision
from mpq_plugins._ptq import PTQ
from mpq_plugins.training import reestimate_batch_norm

_LOG = logging.getLogger("mpq_plugins.nncf")
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# On the small networks of docs/nncf.md 8 images repaired as well as 192; fewer were not tried.
LEAST_IMAGES_FOR_STATISTICS = 8


@final
@dataclass(frozen=True)
class Recipe:
    """How `prepare` quantizes; `subset` is the most calibration batches that are read."""

    merge_branches: bool = True
    asymmetric: bool = False
    ptq: PTQ = field(default_factory=PTQ)
    subset: int = 64


def prepare(model: nn.Module, bits: BitConfig, example: Any, calibration: Iterable[Any], recipe: Recipe) -> nn.Module:
    """A calibrated quantized copy of `model`; see `AbstractAdapter.prepare`."""
    inventory = find_layers(model, example)
    bits.check(inventory)
    for name, precision in bits.layers.items():
        check_precision(name, precision)
    ptq = recipe.ptq
    check_supported(ptq, [layer for layer in inventory if layer.name in bits.layers])
    inputs = _inputs(calibration, recipe.subset, model)
    layers = [layer for layer in inventory if layer.name in bits.layers]
    check_tied_weights(layers, bits.layers)
    graph = traced_copy(model, example)
    calls = calls_of(layers, graph)
    options: dict[str, Any] = {"merge_branches": recipe.merge_branches, "asymmetric": recipe.asymmetric}
    plan = planned(graph, calls, **options)
    owner = owners(calls)
    check_groups(shared_inputs(nncf_setup.points(plan), owner, [layer.name for layer in layers]), bits.layers)

    placed_points: list[nncf_setup.Point] = []

    def on_setup(setup: Any) -> None:
        assign_bits(setup, owner, bits.layers)
        placed_points.extend(nncf_setup.points(setup))

    def on_placed(module: nn.Module) -> None:
        wiring = find_wiring(module, layers, calls, placed_points)
        _share_weight_quantizers(module, wiring.values())
        attach_wiring(module, wiring)
        if ptq.weight_range == "mse":
            fit_weight_ranges(module, wiring.values(), method="mse")
        if ptq.activation_range in ("default", "mse"):
            _fit_activation_ranges(module, wiring, inputs, ptq)

    with quiet(), evaluating(model), nncf_setup.edited_quantization(on_setup, on_placed):
        module = nncf_setup.quantize(
            as_hookable(model),
            inputs,
            ignored=others(graph, calls),
            batchwise=batch_size(inputs[0]) > 1,
            bias_correction=ptq.bias_correction,
            smooth=ptq.equalization == "smooth-quant",
            activation_range=ptq.activation_range,
            **options,
        )
    attach_wiring(module, find_wiring(module, layers, calls, placed_points))
    if ptq.bn_reestimation:
        _reestimate(module, model, inputs)
    return attach_bits(attach_ptq(module.eval(), ptq), bits)


def assign_bits(setup: Any, owner: Mapping[str, str], bits: Mapping[str, Precision]) -> None:
    """Give every planned quantizer its layer's bits, drop those of nothing searched, and add those NNCF left out."""
    weighted, fed = set(), set()
    for point in nncf_setup.points(setup):
        readers = [operation for operation in point.operations if operation in owner]
        if not readers:
            nncf_setup.drop_point(setup, point)
        elif point.is_weight:
            nncf_setup.set_point_bits(setup, point, bits[owner[readers[0]]].weight)
            weighted.update(readers)
        else:
            nncf_setup.set_point_bits(setup, point, bits[owner[readers[0]]].activation)
            fed.update(readers)
    for operation, layer in owner.items():
        if operation not in weighted:
            nncf_setup.add_weight_point(setup, operation, bits[layer].weight)
        if operation not in fed:
            nncf_setup.add_activation_point(setup, operation, bits[layer].activation)


def _share_weight_quantizers(module: nn.Module, wiring: Iterable[Any]) -> None:
    # NNCF makes one quantizer per call. After training their scales would differ, and one weight would become several.
    first: dict[str, nn.Module] = {}
    for layer in wiring:
        for name in layer.weight:
            quantizer = first.setdefault(layer.parameter, nncf_quantizers.quantizer_at(module, name))
            nncf_quantizers.replace_quantizer(module, name, quantizer)


def _fit_activation_ranges(module: nn.Module, wiring: Wiring, inputs: Sequence[Any], ptq: PTQ) -> None:
    # What batch normalisation hands on is right only while nothing before it is quantized, until it is re-estimated.
    places = first_places(module, [hook for layer in wiring.values() for hook in layer.activation])
    with unquantized(module):
        histograms = measured(module, places, inputs)
    fit(module, histograms, method=ptq.activation_range)


def _inputs(calibration: Iterable[Any], subset: int, model: nn.Module) -> list[Any]:
    device = device_of(model)
    inputs = [to_device(batch.inputs, device) for batch in islice(batches_of(calibration), subset)]
    if not inputs:
        raise DataError("no calibration batches were given, but activation ranges need them. Pass some (--data).")
    return [tuple(item) if isinstance(item, list) else item for item in inputs]


def _reestimate(module: nn.Module, model: nn.Module, inputs: Sequence[Any]) -> None:
    n_images = sum(batch_size(item) for item in inputs)
    norms = [name for name, child in model.named_modules() if isinstance(child, _NORMS)]
    if not norms:
        return
    if n_images < LEAST_IMAGES_FOR_STATISTICS:
        _LOG.warning(
            "batch normalisation keeps its float statistics: %d calibration images are fewer than the %d that new ones need",
            n_images,
            LEAST_IMAGES_FOR_STATISTICS,
        )
        return
    # Bias correction moved these biases by the shift that new statistics remove: both together would correct twice.
    for name in norms:
        ours, theirs = module.get_submodule(name), model.get_submodule(name)
        if isinstance(theirs.bias, Tensor):
            with torch.no_grad():
                ours.bias.copy_(theirs.bias)  # type: ignore[operator, union-attr]  # same structure as theirs
    reestimate_batch_norm(module, [(item, None) for item in inputs])
