"""Bytes that an exported file spends on its quantized layers."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

from mpq_plugins.costs.base import AbstractCost
from mpq_plugins.errors import BudgetError
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision

# Weight bits (the index) -> bits per stored element, by target; 0 where the target cannot store them.
STORAGE: dict[str, tuple[int, ...]] = {
    "openvino-compact": (0, 0, 2, 3, 4, 6, 6, 8, 8),
    "openvino-fast": (0, 0, 8, 8, 8, 8, 8, 8, 8),
    "onnx-compact": (0, 0, 2, 4, 4, 8, 8, 8, 8),
    "qcdq": (0, 0, 8, 8, 8, 8, 8, 8, 8),
    "qonnx": (0, 32, 32, 32, 32, 32, 32, 32, 32),
}
_SCALE_AND_BIAS = 2 * 4  # per output channel
_RANGES = 32  # activation range, zero point and shapes of a layer in OpenVINO IR
_DEPTHWISE_RANGES = 3 * 4  # NNCF quantizes the input of a depthwise convolution by channel


@final
@dataclass(frozen=True)
class StoredSize(AbstractCost):
    """Bytes of the weights as their `target` stores them, with scales and biases in float.

    OpenVINO has no 5-bit and no 7-bit type, so those widths take 6 and 8 bits, and it packs 3- and 6-bit weights in groups
    of three bytes; QONNX stores codes as floats. For the OpenVINO targets this bounds the `.bin` from above, where equal
    constants are stored once. Float layers and, for ONNX, the graph itself come on top.
    """

    name: ClassVar[str] = "stored_size"
    unit: ClassVar[str] = "B"
    target: str = "openvino-compact"

    def __post_init__(self) -> None:
        if self.target not in STORAGE:
            raise BudgetError(f"no storage is known for target {self.target!r}. There are: {', '.join(STORAGE)}.")

    def of(self, layer: Layer, precision: Precision) -> float:
        """See `AbstractCost.of`."""
        n_weights = 0 if layer.shares_weight_with is not None else layer.n_weights
        width = STORAGE[self.target][precision.weight]
        if width == 0:
            raise BudgetError(f"{self.target} stores no {precision.weight}-bit weights. Leave them out of the menu.")
        size = packed_bytes(n_weights, width) + _SCALE_AND_BIAS * layer.out_channels
        if self.target.startswith("openvino"):
            size += _RANGES + (_DEPTHWISE_RANGES * layer.groups if _is_depthwise(layer) else 0)
        return float(size)


def packed_bytes(n_elements: int, width: int) -> int:
    """Bytes of `n_elements` of `width` bits, in whole groups that fill whole bytes."""
    shared = math.gcd(width, 8)
    return -(-n_elements // (8 // shared)) * (width // shared)


def _is_depthwise(layer: Layer) -> bool:
    return layer.groups > 1 and layer.groups == layer.input_shape[0]
