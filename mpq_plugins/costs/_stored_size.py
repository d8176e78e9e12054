"""Bytes that an exported file spends on its quantized layers."""

import math
from dataclasses import dataclass
from typing import ClassVar, final

from mpq_plugins._cost import AbstractCost
from mpq_plugins._layers import Layer
from mpq_plugins._precision import Precision

# Weight bits -> bits per stored element, by target.
STORAGE: dict[str, tuple[int, ...]] = {
    "openvino-compact": (0, 0, 2, 3, 4, 6, 6, 8, 8),
    "openvino-fast": (0, 0, 8, 8, 8, 8, 8, 8, 8),
    "qcdq": (0, 0, 8, 8, 8, 8, 8, 8, 8),
    "qonnx": (0, 32, 32, 32, 32, 32, 32, 32, 32),
}


@final
@dataclass(frozen=True)
class StoredSize(AbstractCost):
    """Weight elements at the width their `target` stores, rounded up to bytes, plus a float scale and bias per channel.

    OpenVINO has no 5-bit and no 7-bit type, so those widths are stored as 6 and 8 bits; QONNX stores codes as floats.
    """

    name: ClassVar[str] = "stored_size"
    unit: ClassVar[str] = "B"
    target: str = "openvino-compact"

    def of(self, layer: Layer, precision: Precision) -> float:
        width = STORAGE[self.target][precision.weight]
        n_weights = 0 if layer.shares_weight_with is not None else layer.n_weights
        return math.ceil(n_weights * width / 8) + 2 * 4 * layer.out_channels
