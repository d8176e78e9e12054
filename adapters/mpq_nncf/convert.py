"""A float model with NNCF's quantizers, each of the bits it was asked for and of a fitted range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from mpq_nncf import nncf_quantizers, nncf_setup
from mpq_nncf.groups import check_groups, others, planned, shared_inputs, traced_copy
from mpq_nncf.internals import quiet
from mpq_nncf.options import NNCFOptions
from mpq_nncf.ranges import fit_activation_ranges, fit_weight_ranges
from mpq_nncf.wiring import calls_of, find_wiring, owners
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.record import record
from mpq_plugins.adapter.repairs import Images
from mpq_plugins.model.layers import Layer
from mpq_plugins.model.run import batch_size, evaluating
from mpq_plugins.quantizers.batch_norm import AbstractSite, Recorded
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision


def convert(
    model: nn.Module,
    bits: BitConfig,
    layers: Sequence[Layer],
    example: Any,
    images: Images,
    options: NNCFOptions,
    ptq: PTQ,
    sites: Callable[[nn.Module], Mapping[str, AbstractSite]],
) -> tuple[nn.Module, Recorded]:
    """The module with quantizers of fitted ranges and nothing repaired, and the float moments at `sites` of used images."""
    expected: Recorded = []
    graph = traced_copy(model, example)
    calls = calls_of(layers, graph)
    plan = planned(graph, calls, options)
    owner = owners(calls)
    check_groups(shared_inputs(nncf_setup.points(plan), owner, [layer.name for layer in layers]), bits.layers)
    placed_points: list[nncf_setup.Point] = []

    def on_setup(setup: Any) -> None:
        assign_bits(setup, owner, bits.layers)
        placed_points.extend(nncf_setup.points(setup))

    def on_placed(module: nn.Module) -> None:
        wiring = find_wiring(module, layers, calls, placed_points)
        _share_weight_quantizers(module, wiring.values())
        record(module, wiring=wiring)
        fit_weight_ranges(module, wiring.values(), method=ptq.weight_range)
        expected.extend(fit_activation_ranges(module, wiring, images, ptq, sites(module)))

    smooth = ptq.equalization == "smooth-quant"
    inputs = [batch.inputs for batch in images.given]
    edited = nncf_setup.edited_quantization(on_setup, on_placed, plan=None if smooth else plan)
    with quiet(), evaluating(model), edited:
        module = nncf_setup.quantize(
            nncf_setup.as_hookable(model),
            # The ranges are fitted anew to all of them; only SmoothQuant's factors are NNCF's own.
            inputs if smooth else inputs[:1],
            options,
            ignored=others(graph, calls),
            batchwise=batch_size(inputs[0]) > 1,
            smooth=smooth,
        )
    return record(module, wiring=find_wiring(module, layers, calls, placed_points)), expected


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
