"""Model size as the OMPQ and CSMPQ papers count it."""

from dataclasses import dataclass
from typing import ClassVar, final

from mpq_plugins.costs.base import AbstractCost
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision


@final
@dataclass(frozen=True)
class PublishedSize(AbstractCost):
    """Weights, biases and the two affine parameters per channel of the batch normalisation, all at the weight's bits.

    OMPQ (arXiv 2109.07865) and CSMPQ (arXiv 2212.10220) print this sum over 8 and 2^20 as "Mb". Nothing stores
    batch normalisation at 2 bits; use this to compare with the papers' tables, `StoredSize` for what a file will take.
    """

    name: ClassVar[str] = "published_size"
    unit: ClassVar[str] = "B"

    def of(self, layer: Layer, precision: Precision) -> float:
        """See `AbstractCost.of`."""
        n_weights = 0 if layer.shares_weight_with is not None else layer.n_weights
        return (n_weights + layer.n_biases + layer.n_norm_parameters) * precision.weight / 8
