"""KL divergence: how far the predicted distribution moves when one unit alone is quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import AbstractSensitivity, by_unit
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn


@final
@dataclass(frozen=True)
class KLDivergence(AbstractSensitivity):
    """KL(softmax of the float output || softmax of the quantized one), one unit and choice at a time; no labels.

    The `kl_div` score of NVIDIA ModelOpt's AutoQuantize. It is the cross-entropy increase to be expected if labels were drawn
    from the float model's own predictions. Outputs [N, class], [N, class, ...] or [N, position, class]; positions of an image
    are averaged. With `correction` the quantized network is corrected as a prepared one is, which ModelOpt does not.
    Activations are quantized with the weights where the space searches their bits.
    """

    name: ClassVar[str] = "kl-divergence"
    loss: ClassVar[str] = "kl"
    correction: bool = True
    interpolate: bool = True

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Mean divergences in nats from one sweep."""
        from mpq_plugins.proxies.measuring import SensitivityRun

        lab = SensitivityRun(model, space, batches, self.setup())
        effects = lab.effects(curvature=False)
        # Rounding alone makes a divergence negative.
        return Scores(space, by_unit(space, np.maximum(effects.losses, 0.0)), self.recipe(), effects.facts)
