"""Bit operations."""

from dataclasses import dataclass
from typing import ClassVar, final

from mpq_plugins.costs.base import AbstractCost
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision


@final
@dataclass(frozen=True)
class BitOps(AbstractCost):
    """Multiply-accumulates of one image times weight bits times activation bits."""

    name: ClassVar[str] = "bops"
    unit: ClassVar[str] = "BOPs"

    def of(self, layer: Layer, precision: Precision) -> float:
        """See `AbstractCost.of`."""
        return float(layer.macs * precision.weight * precision.activation)
