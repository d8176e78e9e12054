"""Which quantizer belongs to which layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from mpq_nncf import nncf_quantizers, nncf_setup
from mpq_plugins.adapter.record import recorded_fact
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.layers import Layer


@dataclass(frozen=True)
class LayerWiring:
    """A layer's weight parameter, its output-channel axis, and the places of its quantizers in the hook storage."""

    parameter: str
    channel_axis: int
    weight: tuple[str, ...]
    activation: tuple[str, ...]


Wiring = Mapping[str, LayerWiring]


def wiring_of(module: nn.Module) -> Wiring:
    """The wiring of a module of this adapter; raises `AdapterError` for any other."""
    wiring: Wiring | None = recorded_fact(module, "wiring")
    if wiring is None:
        raise AdapterError(f"{type(module).__name__} was not made by NNCFAdapter.prepare() or load(). Use what they return.")
    return wiring


def calls_of(layers: Iterable[Layer], graph: nncf_setup.TracedGraph) -> dict[str, tuple[nncf_setup.WeightedOp, ...]]:
    """Layer name -> the traced operations that are its calls, found through the weight parameter they read.

    Layers that hold the same weight are told apart by the module path in the operation's name.
    """
    readers: dict[str, list[nncf_setup.WeightedOp]] = {}
    for op in graph.weighted:
        readers.setdefault(op.parameter, []).append(op)
    layers = tuple(layers)
    calls: dict[str, tuple[nncf_setup.WeightedOp, ...]] = {}
    claimed: set[str] = set()
    for layer in layers:
        mine = [op for op in readers.get(layer.weight_name, ()) if _module_path(op.name) in (layer.name, *layer.aliases)]
        claimed.update(op.name for op in mine)
        calls[layer.name] = tuple(mine)
    for layer in layers:  # functional calls have no path of their own
        if not calls[layer.name]:
            calls[layer.name] = tuple(op for op in readers.get(layer.weight_name, ()) if op.name not in claimed)
    return calls


def _module_path(operation: str) -> str:
    # NNCF names an operation module/path/function/call.
    return ".".join(operation.split("/")[:-2])


def owners(calls: Mapping[str, Sequence[nncf_setup.WeightedOp]]) -> dict[str, str]:
    """Operation name -> layer name."""
    return {op.name: name for name, ops in calls.items() for op in ops}


def channel_axis(layer: Layer) -> int:
    """The axis of a weight that runs over output channels."""
    return 1 if layer.kind.startswith("ConvTranspose") else 0


def find_wiring(
    module: nn.Module,
    layers: Iterable[Layer],
    calls: Mapping[str, Sequence[nncf_setup.WeightedOp]],
    points: Sequence[nncf_setup.Point],
) -> dict[str, LayerWiring]:
    """The places of all quantizers of a freshly quantized module; raises `AdapterError` when a layer lacks one."""
    hooks = nncf_quantizers.hooks(module)
    wiring = {}
    for layer in layers:
        ops = {op.name: op for op in calls[layer.name]}
        weight = tuple(h.name for h in hooks if h.before and h.operation in ops and h.port == ops[h.operation].port)
        feeding = [point for point in points if not point.is_weight and set(point.operations) & set(ops)]
        activation = tuple(hook.name for hook in hooks if any(_stands_at(hook, point) for point in feeding))
        if not weight or not activation:
            missing = "weight" if not weight else "activation"
            raise AdapterError(
                f"NNCF placed no {missing} quantizer for {layer.name}, so its bits cannot be set. "
                "Exclude the layer, so that it stays in float, and allocate again."
            )
        wiring[layer.name] = LayerWiring(layer.weight_name, channel_axis(layer), weight, activation)
    return wiring


def _stands_at(hook: nncf_quantizers.Hook, point: nncf_setup.Point) -> bool:
    if hook.operation != point.target:
        return False
    return hook.before and hook.port == point.port if point.port is not None else not hook.before
