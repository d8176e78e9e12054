"""What OpenVINO's CPU plugin does with a precision."""

from __future__ import annotations

from mpq_plugins._errors import AdapterError
from mpq_plugins._layers import Layer
from mpq_plugins._precision import Precision

INTEGER_ACTIVATIONS = (4, 8)


def refuse(layer: Layer, precision: Precision) -> str | None:
    """Why NNCF cannot have `layer` at `precision`, or None."""
    return _refusal(precision)


def check_precision(name: str, precision: Precision) -> None:
    """Raise `AdapterError` when NNCF cannot have the layer `name` at `precision`."""
    reason = _refusal(precision)
    if reason is not None:
        raise AdapterError(f"{name} cannot be {precision}: {reason}. Choose another precision, or exclude the layer.")


def _refusal(precision: Precision) -> str | None:
    return "NNCF has no binary weights; the least is 2 bits" if precision.weight < 2 else None


def advice(layer: Layer, precision: Precision) -> str | None:
    """What to know before deploying `layer` at `precision` on OpenVINO's CPU plugin, or None."""
    told = []
    if precision.activation not in INTEGER_ACTIVATIONS:
        told.append(f"{precision.activation}-bit activations are simulated in f32; integer kernels need 4 or 8 bits")
    elif precision.weight <= 4 and (layer.kind == "Linear" or is_pointwise(layer)):
        told.append("its kernel runs in f32 with compressed weights, not in integers")
    if precision.weight in (5, 7):
        told.append(f"stored as {precision.weight + 1} bits, since OpenVINO has no {precision.weight}-bit type")
    if precision.weight <= 4:
        told.append("weights of 4 bits or less save space, not time: use the fast format where time counts")
    return "; ".join(told) or None


def is_pointwise(layer: Layer) -> bool:
    """Whether the layer is a convolution with a kernel of one element."""
    return layer.kind.startswith("Conv") and all(size == 1 for size in layer.weight_shape[2:])
