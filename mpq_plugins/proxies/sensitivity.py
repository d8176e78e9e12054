"""What scores share that are measured by the sensitivity engine or on the quantized weights."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.space.space import Space, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from mpq_plugins.model.run import Output
    from mpq_plugins.proxies.measuring import MeasurementOptions
    from mpq_plugins.proxies.measuring.weights import QuantizedWeights

Table = tuple[tuple[float, ...], ...]  # [unit][choice]

_TIE_BREAK = 1e-6


# As in `measuring`, which imports torch.
Loss = Literal["auto", "cross_entropy", "kl", "squared_error"] | Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class AbstractSensitivity(AbstractProxy, abc.ABC):
    """A score that the sensitivity engine measures: its options that `MeasurementOptions` has too say how."""

    per_channel: bool = True
    n_images: int = 256
    seed: int = 0
    output: str | int | Callable[..., Any] | None = None
    memory_mb: int = 1024

    def looking_at(self, output: Output) -> AbstractProxy:
        """See `AbstractProxy.looking_at`."""
        return replace(self, output=output)

    def setup(self) -> MeasurementOptions:
        """The options that say how effects are measured."""
        from mpq_plugins.proxies.measuring import MeasurementOptions

        names = [field.name for field in fields(MeasurementOptions) if hasattr(self, field.name)]
        return MeasurementOptions(**{name: getattr(self, name) for name in names})

    def recipe(self) -> dict[str, Any]:
        """Name and options, functions by their names."""
        from mpq_plugins.proxies.measuring import described

        return {"name": self.name, **described(self)}

    @property
    def needs_labels(self) -> bool:
        """Only cross-entropy by name."""
        return getattr(self, "loss", None) == "cross_entropy"


def by_unit(space: Space, row: np.ndarray) -> Table:
    """A row over the choices of all units, cut where units begin."""
    ends = np.cumsum([len(unit.choices) for unit in space.units])[:-1]
    return tuple(tuple(part.tolist()) for part in np.split(row, ends))


def weight_losses(space: Space, variants: QuantizedWeights, loss: Callable[[str, Tensor], float]) -> Table:
    """The sum of `loss(layer, change of its weight)` over the distinct weights of every unit; zeros for pinned units.

    Activations do not count. Where the space searches their bits, choices of equal weight bits would tie, so the narrower
    activation gets a millionth more: it is taken only where a budget asks for it.
    """
    return tuple(_row(space, unit, variants, loss) for unit in space.units)


def _row(space: Space, unit: Unit, variants: QuantizedWeights, loss: Callable[[str, Tensor], float]) -> tuple[float, ...]:
    if not space.is_free(unit):
        return (0.0,) * len(unit.choices)
    of_bits = {
        bits: sum(loss(layer, variants.delta(layer, bits)) for layer in space.weights(unit).values())
        for bits in {choice.weight for choice in unit.choices}
    }
    widest = max(choice.activation for choice in unit.choices)
    return tuple(of_bits[choice.weight] * (1.0 + _TIE_BREAK * (widest - choice.activation)) for choice in unit.choices)
