"""Output error: how much noise quantizing one unit alone adds to the model's output."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np

from mpq_plugins.errors import DataError
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import AbstractSensitivity, by_unit
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins.proxies.measuring import Effects, SensitivityRun

_LEAST_NOISE = 2.0**-46  # of the signal: the square of a float32 rounding error, 138 dB


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
        from mpq_plugins.proxies.measuring import SensitivityRun

        lab = SensitivityRun(model, space, batches, self.setup())
        effects = lab.effects(curvature=False)
        row = effects.losses if self.measure == "mse" else _decibels(lab, effects)
        return Scores(space, by_unit(space, row), self.recipe(), {"power": effects.power, **effects.facts})


def _decibels(lab: SensitivityRun, effects: Effects) -> np.ndarray:  # [choice]
    if not effects.power:
        raise DataError('the output is zero on all images, so it has no signal-to-noise ratio. Use measure="mse".')
    noise = np.maximum(effects.losses / effects.power, _LEAST_NOISE)
    row = np.zeros(len(noise))
    for unit in lab.free:
        choices = slice(lab.start[unit], lab.start[unit + 1])
        row[choices] = 10 * np.log10(noise[choices])
    return row
