"""Controls: allocations without any measurement, to stand beside every score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.utility import Utility, losses, searched_bits
from mpq_plugins.space.precision import Precision
from mpq_plugins.space.space import Space, Unit

if TYPE_CHECKING:
    from torch import nn


@final
@dataclass(frozen=True)
class Uniform(AbstractProxy):
    """One precision for all free units: the largest within the budget.

    The scores are over `space.tied()`, where all free units are one; pinned units keep their pins.
    """

    name: ClassVar[str] = "uniform"
    needs_data: ClassVar[bool] = False

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Minus the bits, over the tied space."""
        tied = space.tied()
        table = tuple(tuple(-float(searched_bits(tied, choice)) for choice in unit.choices) for unit in tied.units)
        return Scores(tied, table, self.recipe())


@final
@dataclass(frozen=True)
class Constant(AbstractProxy):
    """All units equally important: what the utility and the budget choose on their own."""

    name: ClassVar[str] = "constant"
    needs_data: ClassVar[bool] = False
    utility: Utility = "concave"

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Losses at theta = 1."""
        theta = [1.0] * len(space.units)
        return Scores(space, losses(model, space, theta, self.utility), self.recipe(), {"theta": theta})


@final
@dataclass(frozen=True)
class Random(AbstractProxy):
    """Importance drawn uniformly from (0, 1) with a generator of its own; compare with at least 20 seeds."""

    name: ClassVar[str] = "random"
    needs_data: ClassVar[bool] = False
    seed: int = 0
    utility: Utility = "concave"

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Losses at a random theta; `facts` holds it."""
        theta = (1.0 - np.random.default_rng(self.seed).random(len(space.units))).tolist()
        return Scores(space, losses(model, space, theta, self.utility), self.recipe(), {"theta": theta})


@final
@dataclass(frozen=True)
class Projection(AbstractProxy):
    """The allocation closest to "every unit at its widest choice": OMPQ's program with theta = 0.

    The published code starts its solver at the top of the bit range and moves only as far as the budget asks, so for the
    small scores it is given it returns the projection of that start onto the budget: b_i = b_max - lambda P_i. The
    loss is its exact 0/1 form, the squared distance in bits (weight, and activation where searched) of each unit.
    """

    name: ClassVar[str] = "projection"
    needs_data: ClassVar[bool] = False

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Squared distances from the widest choice."""
        both = space.searches_activations
        table = tuple(tuple(_distance(unit, choice, both) for choice in unit.choices) for unit in space.units)
        return Scores(space, table, self.recipe())


def _distance(unit: Unit, choice: Precision, both: bool) -> float:
    widest_weight = max(other.weight for other in unit.choices)
    widest_activation = max(other.activation for other in unit.choices)
    return float((widest_weight - choice.weight) ** 2 + both * (widest_activation - choice.activation) ** 2)
