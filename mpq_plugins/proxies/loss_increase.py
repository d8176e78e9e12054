"""Loss increase: what the loss grows by when one unit alone is quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import AbstractSensitivity, Loss, by_unit
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn


@final
@dataclass(frozen=True)
class LossIncrease(AbstractSensitivity):
    """The measured loss with one unit quantized less the float model's, one unit and choice at a time.

    The diagonal of CLADO (arXiv 2307.05657) and the `naive` metric of MQBench. It can be negative, and more bits can lose
    more on few images. `loss="auto"` is cross-entropy with labels, else KL divergence or squared error of the output; a
    function takes the output and the batch. With `correction` the quantized network is corrected as a prepared one is, which
    the published forms do not. Activations are quantized with the weights where the space searches their bits.
    """

    name: ClassVar[str] = "loss-increase"
    loss: Loss = "auto"
    correction: bool = True
    interpolate: bool = True

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Loss increases from one sweep; `facts` holds the float model's loss."""
        from mpq_plugins.proxies.measuring import SensitivityRun

        lab = SensitivityRun(model, space, batches, self.setup())
        effects = lab.effects(curvature=False)
        facts = {"base_loss": effects.base_loss, **effects.facts}
        return Scores(space, by_unit(space, effects.losses), self.recipe(), facts)
