"""Bytes that an exported file spends on its quantized layers."""

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

from mpq_plugins.common.plugins import make, names
from mpq_plugins.costs.base import AbstractCost
from mpq_plugins.errors import BudgetError, PluginError
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision


@final
@dataclass(frozen=True)
class StoredSize(AbstractCost):
    """Bytes of the weights as their `target` stores them, with scales and biases in float.

    `target` is a format of a registered adapter, which knows its types and what else a layer takes there: OpenVINO has no
    5-bit and no 7-bit type, for instance, so those widths take 6 and 8 bits. Float layers and, for ONNX, the graph itself come
    on top.
    """

    name: ClassVar[str] = "stored_size"
    unit: ClassVar[str] = "B"
    target: str = "openvino-compact"

    def __post_init__(self) -> None:
        _adapter_of(self.target)

    def of(self, layer: Layer, precision: Precision) -> float:
        """See `AbstractCost.of`."""
        adapter = _adapter_of(self.target)
        n_weights = 0 if layer.shares_weight_with is not None else layer.n_weights
        width = adapter.storage(precision, self.target)
        if width == 0:
            raise BudgetError(f"{self.target} stores no {precision.weight}-bit weights. Leave them out of the menu.")
        return float(packed_bytes(n_weights, width) + adapter.overhead(layer, self.target))


@functools.cache
def _adapter_of(target: str) -> Any:
    """The registered adapter that writes a format; raises `BudgetError` where none does."""
    formats: list[str] = []
    for name in names("adapters"):
        with contextlib.suppress(PluginError):  # one whose framework is not installed
            adapter = make("adapters", name)
            if target in adapter.formats:
                return adapter
            formats += adapter.formats
    raise BudgetError(f"no adapter writes the format {target!r}. There are: {', '.join(formats)}.")


def packed_bytes(n_elements: int, width: int) -> int:
    """Bytes of `n_elements` of `width` bits, in whole groups that fill whole bytes."""
    shared = math.gcd(width, 8)
    return -(-n_elements // (8 // shared)) * (width // shared)
