"""From a float model and its bits to a quantized module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import nn

from mpq_nncf import nncf_quantizers, nncf_setup
from mpq_nncf.activation_range import check_usable, fit, histogram_of, measure, unquantized
from mpq_nncf.advice import check_precisions
from mpq_nncf.groups import check_groups, check_tied_weights, others, planned, shared_inputs, traced_copy
from mpq_nncf.hookable import as_hookable
from mpq_nncf.options import attach_options
from mpq_nncf.ptq import attach_ptq, check_supported
from mpq_nncf.quiet import quiet
from mpq_nncf.set_bits import first_places
from mpq_nncf.weight_range import fit_weight_ranges
from mpq_nncf.wiring import Wiring, attach_wiring, calls_of, find_wiring, owners, wiring_of
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.repairs import Images, Judge, Repair, are_fine, attach_repairs, better, repair, to_correct_with
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.discover import find_layers
from mpq_plugins.model.layers import Layer
from mpq_plugins.model.run import Batch, batch_size, calibration_batches, device_of, evaluating, to_device
from mpq_plugins.model.unread import REASON, unread_layers
from mpq_plugins.quantizers.batch_norm import AbstractSite, Recorded, bias_sites, norm_sites, recorded, reestimate_batch_norm
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision

_FINE = 8  # bits of activations that corrections beside narrow weights take as float
_LOG = logging.getLogger("mpq_plugins.nncf")
# On the small networks of docs/nncf.md 8 images gave statistics as good as 192; fewer were not tried.
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
    check_precisions(bits.layers)
    layers = [layer for layer in inventory if layer.name in bits.layers]
    check_supported(recipe.ptq, layers)
    _check_read(model, layers, example)
    batches = _batches(calibration_batches(calibration, example, recipe.subset), model)
    check_tied_weights(layers, bits.layers)
    images = Images.of(model, batches, recipe.ptq.held_out)
    judge = Judge(model, images.quick_held) if images.quick_held else None
    module, repairs = _repaired(model, bits, layers, example, images, recipe, judge)
    if recipe.ptq.equalization != "none" and judge is not None:
        without = replace(recipe, ptq=replace(recipe.ptq, equalization="none"))
        plain, of_plain = _repaired(model, bits, layers, example, images, without, judge)
        option = f"equalization={recipe.ptq.equalization}"
        chosen, made = better(option, judge, plain, module)
        repairs = [*(repairs if made.kept else of_plain), made]
        module, recipe = chosen, recipe if made.kept else without
    attach_repairs(module, repairs)
    attach_options(module, {"merge_branches": recipe.merge_branches, "asymmetric": recipe.asymmetric})
    return attach_bits(attach_ptq(module.eval(), recipe.ptq), bits)


def _check_read(model: nn.Module, layers: Sequence[Layer], example: Any) -> None:
    """Raise `AdapterError` for layers that the exported file would lack."""
    unread = unread_layers(model, layers, example)
    if unread:
        raise AdapterError(f"NNCF cannot quantize {', '.join(unread)}: {REASON}. Exclude these layers from the search.")


def _repaired(
    model: nn.Module,
    bits: BitConfig,
    layers: Sequence[Layer],
    example: Any,
    images: Images,
    recipe: Recipe,
    judge: Judge | None,
) -> tuple[nn.Module, list[Repair]]:
    """The module with ranges fitted to all `images` and repaired on those of them that are used for that."""
    # What a normalisation reads is centred by its statistics; only the other layers need another bias.
    unnormed = {layer.name: layer.kind for layer in layers if not layer.n_norm_parameters}

    def sites(module: nn.Module) -> dict[str, AbstractSite]:
        norms = norm_sites(module) if recipe.ptq.batch_norm == "corrected" else {}
        return {**norms, **(bias_sites(module, unnormed) if recipe.ptq.bias_correction else {})}

    module, expected = _quantized(model, bits, layers, example, images, recipe, sites)
    wiring = wiring_of(module)
    weights = {name for layer in wiring.values() for name in layer.weight}
    # Beside narrow weights, rounding to 8 bits moves no mean that counts, and takes a sixth of the pass.
    places = first_places(module, [hook for layer in wiring.values() for hook in layer.activation])
    widths = {place: nncf_quantizers.bits_of(nncf_quantizers.quantizer_at(module, place)) for place in places}
    fine = [] if are_fine(bits) else [place for place, width in widths.items() if width >= _FINE]
    with nncf_quantizers.remembering(nncf_quantizers.quantizer_at(module, name) for name in sorted(weights)):
        repairs = repair(
            module,
            recipe.ptq,
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


def _quantized(
    model: nn.Module,
    bits: BitConfig,
    layers: Sequence[Layer],
    example: Any,
    images: Images,
    recipe: Recipe,
    sites: Callable[[nn.Module], Mapping[str, AbstractSite]],
) -> tuple[nn.Module, Recorded]:
    """The module with quantizers of fitted ranges and nothing repaired, and the float moments at `sites` of used images."""
    expected: Recorded = []
    ptq = recipe.ptq
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
        fit_weight_ranges(module, wiring.values(), method=ptq.weight_range)
        expected.extend(_fit_activation_ranges(module, wiring, images, ptq, sites(module)))

    smooth = ptq.equalization == "smooth-quant"
    inputs = [batch.inputs for batch in images.given]
    edited = nncf_setup.edited_quantization(on_setup, on_placed, plan=None if smooth else plan)
    with quiet(), evaluating(model), edited:
        module = nncf_setup.quantize(
            as_hookable(model),
            # The ranges are fitted anew to all of them; only SmoothQuant's factors are NNCF's own.
            inputs if smooth else inputs[:1],
            ignored=others(graph, calls),
            batchwise=batch_size(inputs[0]) > 1,
            smooth=smooth,
            **options,
        )
    attach_wiring(module, find_wiring(module, layers, calls, placed_points))
    return module, expected


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


def _fit_activation_ranges(
    module: nn.Module, wiring: Wiring, images: Images, ptq: PTQ, sites: Mapping[str, AbstractSite]
) -> Recorded:
    """Also gives the moments at `sites` of used images: in this pass the module computes what the float network does."""
    # What batch normalisation hands on is right only while nothing before it is quantized, until it is corrected.
    places = first_places(module, [hook for layer in wiring.values() for hook in layer.activation])
    with unquantized(module):
        widths = {place: nncf_quantizers.bits_of(nncf_quantizers.quantizer_at(module, place)) for place in places}
        n_batches = len(images.quick_used) + len(images.quick_held)
        histograms = {place: histogram_of(module, place, width, n_batches) for place, width in widths.items()}
        with recorded(module, sites) as expected:
            measure(module, histograms, [batch.inputs for batch in images.quick_used])
        measure(module, histograms, [batch.inputs for batch in images.quick_held])
    check_usable(histograms)
    fit(module, histograms, method=ptq.activation_range)
    return expected


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
