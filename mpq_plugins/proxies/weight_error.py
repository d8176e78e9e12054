"""Weight error: how far quantization moves the weights, whatever the network makes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import weight_losses
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
@dataclass(frozen=True)
class WeightError(AbstractProxy):
    """Squared error of the weights, ||Q(w) - w||^2 summed over a unit: no data, no forward pass.

    The sensitivity of AMD Quark's planner. `normalised` divides by ||w||^2, so that layers count by their relative error
    and not by their size; a weight of zeros has no error. `per_channel=False` takes one scale per tensor. Activations do
    not count (`weight_losses` in `_sensitivity` says how ties are settled).
    """

    name: ClassVar[str] = "weight-error"
    needs_data: ClassVar[bool] = False
    normalised: bool = False
    per_channel: bool = True

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Squared errors. Raises `ModelError` for weights that are not finite."""
        from mpq_plugins.proxies.measuring import QuantizedWeights

        variants = QuantizedWeights(model, space, per_channel=self.per_channel)

        def error(layer: str, delta: Tensor) -> float:
            moved = _energy(delta)
            return moved / _energy(variants.own(layer)) if self.normalised and moved else moved

        return Scores(space, weight_losses(space, variants, error), self.recipe())


def _energy(weight: Tensor) -> float:
    return float(weight.double().square().sum())
