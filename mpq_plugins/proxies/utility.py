"""From the importance of units to the loss of their choices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from mpq_plugins.space.precision import Precision
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import Tensor, nn

Utility = Literal["concave", "linear"]
Table = tuple[tuple[float, ...], ...]  # [unit][choice]


def losses(model: nn.Module, space: Space, importance: Sequence[float], utility: Utility) -> Table:
    """Losses of every choice, for units of the given importance; none grows with more bits unless its importance is negative.

    `linear`: minus importance times bits, the objective of OMPQ and CSMPQ. The gain of a bit is the same at 2 bits and at 8,
    so solutions take the ends of the menu. Weight and activation bits add up where activation bits are searched.
    `concave`: importance times the expected noise, sum over the unit's layers of P s^2 (4^-w + 4^-a), with P weights of
    variance s^2. A uniform quantizer of w bits has a step proportional to 2^-w, hence noise proportional to s^2 4^-w on each
    weight: the first bits matter most, and large layers that hold much of the weight energy matter more. Nothing is known of
    the activations here, so their relative noise 4^-a counts like that of the weights they meet.
    Both are scaled so that the largest magnitude of a free unit's importance (and noise) is 1: the best allocations
    stay the same.
    """
    shares = _scaled(space, importance)
    if utility == "linear":
        return _table(space, lambda index, choice: -shares[index] * searched_bits(space, choice))
    noise = _noise_shares(model, space)
    return _table(space, lambda index, choice: shares[index] * noise[index] * (4.0**-choice.weight + 4.0**-choice.activation))


def searched_bits(space: Space, choice: Precision) -> int:
    """Weight bits, plus activation bits where some unit may choose them."""
    return choice.weight + (choice.activation if space.searches_activations else 0)


def _noise_shares(model: nn.Module, space: Space) -> list[float]:  # [unit]
    """Squared deviation of each unit's weights from their mean, 1 for the largest free unit; shared weights count once."""
    from mpq_plugins.proxies.measuring import QuantizedWeights

    weights = QuantizedWeights(model, space)
    return _scaled(space, [math.fsum(map(_deviation, map(weights.own, space.weights(unit).values()))) for unit in space.units])


def _scaled(space: Space, values: Sequence[float]) -> list[float]:  # [unit]
    # By magnitude: importances may be negative, all of them too, and must keep their signs.
    largest = max((abs(value) for unit, value in zip(space.units, values, strict=True) if space.is_free(unit)), default=0.0)
    return [value / (largest or 1.0) for value in values]


def _deviation(weight: Tensor) -> float:
    values = weight.double()
    return float((values - values.mean()).square().sum())


def _table(space: Space, loss: Callable[[int, Precision], float]) -> Table:
    return tuple(tuple(loss(index, choice) for choice in unit.choices) for index, unit in enumerate(space.units))
