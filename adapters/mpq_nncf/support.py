"""What NNCF can quantize, what OpenVINO makes of it, and why neither can do the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_nncf import nncf_setup
from mpq_nncf.groups import traced_copy
from mpq_nncf.wiring import calls_of
from mpq_plugins.adapter.hooks import PreHook, run_hooked
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.layers import Inventory, Layer
from mpq_plugins.model.run import tensors
from mpq_plugins.model.unread import unread_layers
from mpq_plugins.space.precision import Precision

INTEGER_ACTIVATIONS = (4, 8)


def check_precisions(layers: Mapping[str, Precision], *, overflow_fix: bool = False) -> None:
    """Raise `AdapterError` when NNCF cannot have a layer (name -> precision) as asked."""
    for name, precision in layers.items():
        reason = refuse(precision, overflow_fix=overflow_fix)
        if reason is not None:
            raise AdapterError(f"{name} cannot be {precision}: {reason}. Choose another precision, or exclude the layer.")


def refuse(precision: Precision, *, overflow_fix: bool = False) -> str | None:
    """Why NNCF cannot have a precision, or None."""
    if precision.weight < 2:
        return "NNCF has no binary weights; the least is 2 bits"
    if overflow_fix and _may_saturate(precision):
        return "overflow_fix=True keeps 8-bit weights away from 8-bit activations; w7a8 is stored in as many bytes"
    return None


def _may_saturate(precision: Precision) -> bool:
    # Two products of an unsigned and a signed byte are added in 16 bits: 2 x 255 x 127 exceeds 32,767, 2 x 255 x 64 does not.
    return precision.weight == 8 and precision.activation == 8


def advice(layer: Layer, precision: Precision) -> str | None:
    """What to know before deploying `layer` at `precision` on OpenVINO's CPU plugin, or None."""
    told = []
    if precision.activation not in INTEGER_ACTIVATIONS:
        told.append(f"{precision.activation}-bit activations are simulated in f32; integer kernels need 4 or 8 bits")
    elif precision.weight <= 4 and (layer.kind == "Linear" or is_pointwise(layer)):
        told.append("its kernel runs in f32 with compressed weights, not in integers")
    if precision.weight in (5, 7):
        told.append(f"stored as {precision.weight + 1} bits, since OpenVINO has no {precision.weight}-bit type")
    if _may_saturate(precision):
        told.append("8-bit sums saturate in integer kernels of CPUs without VNNI: there use overflow_fix=True, or w7a8")
    if precision.weight <= 4:
        told.append("weights of 4 bits or less save space, not time: use the fast format where time counts")
    return "; ".join(told) or None


def is_pointwise(layer: Layer) -> bool:
    """Whether the layer is a convolution with a kernel of one element."""
    return layer.kind.startswith("Conv") and all(size == 1 for size in layer.weight_shape[2:])


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
    model: nn.Module, graph: nncf_setup.TracedGraph, calls: Mapping[str, Sequence[nncf_setup.WeightedOp]], example: Any
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

    def note(name: str) -> PreHook:
        return lambda _module, args, kwargs: seen[name].extend(tensors((args, kwargs)))

    try:
        run_hooked(model, [(modules[name], note(name)) for name in seen], [example, _changed(example)])
    except Exception:  # of the user's model, which need not take changed inputs
        return frozenset()
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
