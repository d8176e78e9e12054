"""What a model holds under several names, and which layers read activation quantizers that share one scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpq_brevitas import internals as brevitas
from mpq_plugins.model.discover import LAYER_TYPES

ROOT = "weight"  # what `find_layers` calls a model that is itself a layer


class RootLayer(nn.Module):
    """A model that is itself a layer, as a module that holds it: a layer can only be replaced inside something."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = layer

    def forward(self, *args: object, **kwargs: object) -> object:
        """The layer's own result."""
        return self.weight(*args, **kwargs)


def rooted(model: nn.Module) -> nn.Module:
    """`model`, wrapped if it is itself a layer; layer names stay what `find_layers` says."""
    return RootLayer(model) if isinstance(model, LAYER_TYPES) else model


def aliases(model: nn.Module) -> dict[str, str]:
    """Later names of modules that are registered more than once -> their first name."""
    first: dict[int, str] = {}
    later = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) != name:
            later[name] = first[id(module)]
    return later


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Later names of parameters that are registered more than once -> their first name."""
    first: dict[int, str] = {}
    later = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            later[name] = first[id(parameter)]
    return later


def tie_parameters(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Make every later name refer to the parameter of its first name again."""
    for later, first in ties.items():
        owner, _, attribute = later.rpartition(".")
        parameter = model.get_parameter(first)
        if getattr(model.get_submodule(owner), attribute) is not parameter:
            setattr(model.get_submodule(owner), attribute, parameter)


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
