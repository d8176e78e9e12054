"""Bytes of the weights alone."""

from dataclasses import dataclass
from typing import ClassVar, final

from mpq_plugins.costs.base import AbstractCost
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision


@final
@dataclass(frozen=True)
class WeightSize(AbstractCost):
    """Weight elements times weight bits over 8: no scales, no biases, no padding. A shared weight counts once."""

    name: ClassVar[str] = "size"
    unit: ClassVar[str] = "B"

    def of(self, layer: Layer, precision: Precision) -> float:
        """See `AbstractCost.of`."""
        if layer.shares_weight_with is not None:
            return 0.0
        return layer.n_weights * precision.weight / 8
