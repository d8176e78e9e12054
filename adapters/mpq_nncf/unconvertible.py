"""Layers that NNCF would leave in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_nncf import nncf_setup
from mpq_nncf.groups import traced_copy
from mpq_nncf.wiring import calls_of
from mpq_plugins.model.layers import Inventory
from mpq_plugins.model.run import call, evaluating, tensors
from mpq_plugins.model.unread import unread_layers


def unconvertible(model: nn.Module, inventory: Inventory, example: Any = None) -> dict[str, str]:
    """Layer name -> reason.

    A quantizer stands between a parameter and the operation that reads it, so the weight must be a parameter; with an
    `example`, NNCF must also see the operation in its own trace.
    """
    parameters = {name for name, _ in model.named_parameters()}
    reasons = {
        layer.name: "its weight is computed, not a parameter, so NNCF has no place for a weight quantizer"
        for layer in inventory
        if layer.weight_name not in parameters
    }
    if example is None:
        return reasons
    graph = traced_copy(model, example)
    calls = calls_of(inventory, graph)
    unseen = {name: "NNCF's trace shows no operation that reads its weight" for name, ops in calls.items() if not ops}
    return {**unread_layers(model, inventory, example), **_unfed(model, graph, calls, example), **unseen, **reasons}


def _unfed(
    model: nn.Module, graph: nncf_setup.Graph, calls: Mapping[str, Sequence[nncf_setup.WeightedOp]], example: Any
) -> dict[str, str]:
    """Layer name -> reason, for layers that compute the same for every image, as those of relative positions do.

    OpenVINO computes what they give while it converts the module, and nothing of their quantizers is left.
    """
    reached = nncf_setup.fed(graph)
    suspects = [name for name, ops in calls.items() if ops and not any(op.name in reached for op in ops)]
    # A trace loses the thread where values leave torch, so a second look is taken.
    constant = _with_equal_inputs(model, suspects, example) if suspects else frozenset()
    reason = "its input is the same for every image, so OpenVINO puts a constant in its place"
    return {name: reason for name in suspects if name in constant}


def _with_equal_inputs(model: nn.Module, names: Sequence[str], example: Any) -> frozenset[str]:
    """Those of the modules `names` whose inputs stay as they are when the example changes."""
    modules = dict(model.named_modules())
    seen: dict[str, list[Tensor]] = {name: [] for name in names if name in modules}

    def note(name: str) -> Any:
        return lambda _module, args, kwargs: seen[name].extend(tensors((args, kwargs)))

    handles = [modules[name].register_forward_pre_hook(note(name), with_kwargs=True) for name in seen]
    try:
        with evaluating(model):
            call(model, example)
            call(model, _changed(example))
    except Exception:  # of the user's model, which need not take changed inputs
        return frozenset()
    finally:
        for handle in handles:
            handle.remove()
    halves = {name: (values[: len(values) // 2], values[len(values) // 2 :]) for name, values in seen.items()}
    return frozenset(
        name
        for name, (first, second) in halves.items()
        if first and len(first) == len(second) and all(map(torch.equal, first, second))
    )


def _changed(value: Any) -> Any:
    """Inputs of the same kind with other values; whole numbers change places, for they may be indices."""
    if isinstance(value, Tensor):
        return torch.randn_like(value) if value.is_floating_point() else value.flip(-1) if value.dim() else value
    if isinstance(value, Mapping):
        return {key: _changed(item) for key, item in value.items()}
    return tuple(map(_changed, value)) if isinstance(value, (tuple, list)) else value
