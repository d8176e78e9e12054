"""What OpenVINO's CPU plugin does with a precision."""

from __future__ import annotations

from collections.abc import Mapping

from mpq_plugins.errors import AdapterError
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision

INTEGER_ACTIVATIONS = (4, 8)


def check_precisions(layers: Mapping[str, Precision], *, overflow_fix: bool = False) -> None:
    """Raise `AdapterError` when NNCF cannot have a layer (name -> precision) as asked."""
    for name, precision in layers.items():
        reason = refusal(precision, overflow_fix=overflow_fix)
        if reason is not None:
            raise AdapterError(f"{name} cannot be {precision}: {reason}. Choose another precision, or exclude the layer.")


def refusal(precision: Precision, *, overflow_fix: bool = False) -> str | None:
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
