"""Peak size of a quantized activation."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from mpq_plugins.costs.base import AbstractCost
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision


@final
@dataclass(frozen=True)
class ActivationMemory(AbstractCost):
    """Bytes of the largest quantized activation that any layer reads, for one image.

    A lower bound of the working memory: what a target keeps alive beside it depends on its schedule.
    """

    name: ClassVar[str] = "activation_memory"
    unit: ClassVar[str] = "B"
    reduce: ClassVar[Literal["sum", "max"]] = "max"

    def of(self, layer: Layer, precision: Precision) -> float:
        """See `AbstractCost.of`."""
        return layer.n_input_elements * precision.activation / 8
