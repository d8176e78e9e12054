"""Which layers read one activation quantizer."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from mpq_nncf import nncf_setup
from mpq_nncf.internals import quiet
from mpq_nncf.options import NNCFOptions
from mpq_nncf.wiring import calls_of, owners
from mpq_plugins.adapter.checks import check_agreement
from mpq_plugins.model.discover import find_layers
from mpq_plugins.model.run import device_of, evaluating, to_device
from mpq_plugins.space.precision import Precision


def activation_groups(model: nn.Module, example: Any, options: NNCFOptions) -> tuple[tuple[str, ...], ...]:
    """Groups of two or more layers whose activation bits must agree, in the order of the layers."""
    layers = find_layers(model, example).layers
    graph = traced_copy(model, example)
    calls = calls_of(layers, graph)
    setup = planned(graph, calls, options)
    return shared_inputs(nncf_setup.points(setup), owners(calls), [layer.name for layer in layers])


def traced_copy(model: nn.Module, example: Any) -> nncf_setup.TracedGraph:
    """NNCF's graph of a copy of `model`; the model stays as it was."""
    with quiet(), evaluating(model):
        return nncf_setup.trace(nncf_setup.as_hookable(copy.deepcopy(model)), to_device(example, device_of(model)))


def planned(graph: nncf_setup.TracedGraph, calls: Mapping[str, Sequence[nncf_setup.WeightedOp]], options: NNCFOptions) -> Any:
    """NNCF's quantizer setup when only the given layers are quantized."""
    with quiet():
        return nncf_setup.plan(graph, options, ignored=others(graph, calls))


def others(graph: nncf_setup.TracedGraph, calls: Mapping[str, Sequence[nncf_setup.WeightedOp]]) -> tuple[str, ...]:
    """Operations NNCF might quantize that are no call of a layer: residual adds, pools, means, float layers."""
    wanted = owners(calls)
    return tuple(name for name in graph.quantizable if name not in wanted)


def shared_inputs(
    points: Iterable[nncf_setup.Point], owner: Mapping[str, str], order: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Layers joined by a common activation quantizer or by quantizers with one scale."""
    clusters: list[set[str]] = []
    unified: dict[int, set[str]] = {}
    for point in points:
        if point.is_weight:
            continue
        readers = {owner[operation] for operation in point.operations if operation in owner}
        if point.unified is not None:
            unified.setdefault(point.unified, set()).update(readers)
        elif readers:
            clusters.append(readers)
    merged: list[set[str]] = []
    for cluster in (*clusters, *unified.values()):
        touching = [other for other in merged if other & cluster]
        merged = [other for other in merged if not other & cluster] + [cluster.union(*touching)]
    position = {name: index for index, name in enumerate(order)}
    groups = [tuple(sorted(cluster, key=position.__getitem__)) for cluster in merged if len(cluster) > 1]
    return tuple(sorted(groups, key=lambda group: position[group[0]]))


def check_groups(groups: Iterable[Sequence[str]], bits: Mapping[str, Precision]) -> None:
    """Raise `AdapterError` when layers that read one activation quantizer ask for different activation bits."""
    advice = (
        "Allocate with this adapter (`mpq allocate --adapter nncf`), which ties them, or give the readers of one "
        "tensor a quantizer each: NNCFAdapter(merge_branches=False), `--adapter-option merge_branches=false`."
    )
    check_agreement(groups, bits, "activation", advice)
