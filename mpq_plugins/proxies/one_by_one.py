"""Scores of one unit at a time: what the loss or the output makes of it when it alone is quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np

from mpq_plugins.errors import DataError
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import AbstractSensitivity, Loss, by_unit
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins.proxies.measuring import Effects

_LEAST_NOISE = 2.0**-46  # of the signal: the square of a float32 rounding error, 138 dB


def _sweep(proxy: AbstractSensitivity, model: nn.Module, space: Space, batches: Iterable[Any]) -> Effects:
    """The loss of every choice of every unit, the others as they are."""
    from mpq_plugins.proxies.measuring import SensitivityRun

    return SensitivityRun(model, space, batches, proxy.setup()).effects(curvature=False)


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
        effects = _sweep(self, model, space, batches)
        facts = {"base_loss": effects.base_loss, **effects.facts}
        return Scores(space, by_unit(space, effects.losses), self.recipe(), facts)


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
        effects = _sweep(self, model, space, batches)
        # Rounding alone makes a divergence negative.
        return Scores(space, by_unit(space, np.maximum(effects.losses, 0.0)), self.recipe(), effects.facts)


@final
@dataclass(frozen=True)
class OutputError(AbstractSensitivity):
    """Error of the network's output, one unit and choice at a time; no labels, any output.

    `measure="mse"`: E[(y_q - y)^2], the mean square of the change. `measure="sqnr"`: minus the signal-to-quantization-noise
    ratio in decibels, -10 log10(E[y^2] / E[(y_q - y)^2]), the ranking metric of Qualcomm AIMET (Pandey et al., "A Practical
    Mixed Precision Algorithm for Post-Training Quantization", arXiv 2302.05397). Both order the choices alike; a plan's sum
    of decibels is the product of its errors, so a unit of small error counts as much as one of large error.
    With `correction` y_q is corrected as a prepared network is; AIMET has no such thing.
    Noise below float32 rounding counts as 138 dB. Activations are quantized with the weights where the space searches
    their bits.
    """

    name: ClassVar[str] = "output-error"
    loss: ClassVar[str] = "squared_error"
    measure: Literal["mse", "sqnr"] = "mse"
    correction: bool = True
    interpolate: bool = True

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Errors from one sweep; `facts` holds the mean square of the float output."""
        effects = _sweep(self, model, space, batches)
        row = effects.losses if self.measure == "mse" else _decibels(space, effects)
        return Scores(space, by_unit(space, row), self.recipe(), {"power": effects.power, **effects.facts})


def _decibels(space: Space, effects: Effects) -> np.ndarray:  # [choice]
    if not effects.power:
        raise DataError('the output is zero on all images, so it has no signal-to-noise ratio. Use measure="mse".')
    noise = np.maximum(effects.losses / effects.power, _LEAST_NOISE)
    free = np.concatenate([np.full(len(unit.choices), space.is_free(unit)) for unit in space.units])
    return np.where(free, 10 * np.log10(noise), 0.0)
