"""Activation groups: which layers read quantizers that share one scale, seen in the traced graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpq_brevitas import brevitas_internals as brevitas


@dataclass(frozen=True)
class Group:
    """Names of activation quantizers that share a scale, and of the layers that read them."""

    quantizers: tuple[str, ...]
    layers: tuple[str, ...]


def activation_groups_of_graph(module: Any) -> tuple[Group, ...]:
    """Every group of the graph, those that feed no layer included, in graph order."""
    quantizers: dict[int, list[str]] = {}
    layers: dict[int, list[str]] = {}
    for node in module.graph.nodes:
        if node.op != "call_module":
            continue
        called = module.get_submodule(node.target)
        if brevitas.has_activation_quantizer(called):
            members = quantizers.setdefault(brevitas.scale_identity(called), [])
            if node.target not in members:
                members.append(node.target)
        elif brevitas.is_brevitas_layer(called):
            source = _quantizer_before(module, node)
            if source is not None:
                layers.setdefault(brevitas.scale_identity(source), []).append(node.target)
    return tuple(Group(tuple(names), tuple(layers.get(key, ()))) for key, names in quantizers.items())


def quantizers_of_group(module: nn.Module, group: Group) -> Iterator[Any]:
    """The quantizing modules of a group."""
    return (module.get_submodule(name) for name in group.quantizers)


def _quantizer_before(module: Any, node: Any) -> nn.Module | None:
    """The activation quantizer that a layer reads, looking through pools, reshapes and concatenations."""
    while node.all_input_nodes:
        node = node.all_input_nodes[0]
        if node.op != "call_module":
            continue
        called = module.get_submodule(node.target)
        if brevitas.has_activation_quantizer(called):
            return called
        if brevitas.is_brevitas_layer(called):
            return None
    return None
