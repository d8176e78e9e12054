"""From a float model and its bits to a calibrated quantized module."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.convert import convert
from mpq_nncf.options import NNCFOptions, check_options
from mpq_nncf.ranges import first_places, unquantized
from mpq_nncf.wiring import wiring_of
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.checks import check_tied_weights
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.record import record
from mpq_plugins.adapter.remembered import remembered
from mpq_plugins.adapter.repairs import Images, Judge, Repair, are_fine, keep_what_helps, repair, to_correct_with
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.discover import find_layers
from mpq_plugins.model.run import Batch, calibration_batches, device_of, to_device
from mpq_plugins.model.unread import REASON, unread_layers
from mpq_plugins.quantizers.batch_norm import AbstractSite, bias_sites, norm_sites, reestimate_batch_norm
from mpq_plugins.space.bits import BitConfig

_FINE = 8  # bits of activations that corrections beside narrow weights take as float
_LOG = logging.getLogger("mpq_plugins.nncf")
# On the small networks of docs/nncf.md 8 images gave statistics as good as 192; fewer were not tried.
LEAST_IMAGES_FOR_STATISTICS = 8


def prepare(
    model: nn.Module,
    bits: BitConfig,
    example: Any,
    calibration: Iterable[Any],
    options: NNCFOptions,
    ptq: PTQ,
    *,
    subset: int,
) -> nn.Module:
    """See `AbstractAdapter.prepare`; `subset` is the most calibration batches that are read."""
    inventory = find_layers(model, example)
    bits.check(inventory)
    layers = [layer for layer in inventory if layer.name in bits.layers]
    check_options(ptq, layers)
    unread = unread_layers(model, layers, example)
    if unread:
        raise AdapterError(f"NNCF cannot quantize {', '.join(unread)}: {REASON}. Exclude these layers from the search.")
    check_tied_weights(layers, bits.layers)
    images = Images.of(model, _batches(calibration_batches(calibration, example, subset), model), ptq.held_out)
    # What a normalisation reads is centred by its statistics; only the other layers need another bias.
    unnormed = {layer.name: layer.kind for layer in layers if not layer.n_norm_parameters}

    def quantized(ptq: PTQ, judge: Judge | None) -> tuple[nn.Module, list[Repair]]:
        def sites(module: nn.Module) -> dict[str, AbstractSite]:
            norms = norm_sites(module) if ptq.batch_norm == "corrected" else {}
            return {**norms, **(bias_sites(module, unnormed) if ptq.bias_correction else {})}

        module, expected = convert(model, bits, layers, example, images, options, ptq, sites)
        # Beside narrow weights, rounding to 8 bits moves no mean that counts, and takes a sixth of the pass.
        fine = [] if are_fine(bits) else _fine_activations(module)
        weights = sorted({name for layer in wiring_of(module).values() for name in layer.weight})
        with remembered(nncf_quantizers.quantizer_at(module, name) for name in weights):
            repairs = repair(
                module,
                ptq,
                to_correct_with(images.quick_used, bits),
                judge,
                reference=model,
                norms=lambda: norm_sites(module),
                biases=lambda: bias_sites(module, unnormed),
                reestimate=lambda: _reestimate(module, images.used),
                expected=expected,
                correcting=lambda: unquantized(module, fine),
            )
        return module, repairs

    module, ptq = keep_what_helps(model, images, ptq, quantized)
    return attach_bits(record(module.eval(), options=options, ptq=ptq), bits)


def _fine_activations(module: nn.Module) -> list[str]:
    """One place of each activation quantizer of 8 bits."""
    places = first_places(module, [hook for layer in wiring_of(module).values() for hook in layer.activation])
    return [place for place in places if nncf_quantizers.bits_of(nncf_quantizers.quantizer_at(module, place)) >= _FINE]


def _batches(batches: Iterable[Batch], model: nn.Module) -> list[Batch]:
    device = device_of(model)
    found = [Batch(to_device(batch.inputs, device)) for batch in batches]
    return [Batch(tuple(batch.inputs)) if isinstance(batch.inputs, list) else batch for batch in found]


def _reestimate(module: nn.Module, batches: Sequence[Batch]) -> None:
    n_images = sum(map(len, batches))
    if n_images < LEAST_IMAGES_FOR_STATISTICS:
        _LOG.warning(
            "batch normalisation keeps its float statistics: %d calibration images are fewer than the %d that new ones need",
            n_images,
            LEAST_IMAGES_FOR_STATISTICS,
        )
        return
    reestimate_batch_norm(module, batches)
