"""What a precision costs, and how much of it a user allows."""

from __future__ import annotations

import abc
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from mpq_plugins._errors import BudgetError
from mpq_plugins._layers import Layer
from mpq_plugins._precision import Precision
from mpq_plugins._space import Space


class AbstractCost(abc.ABC):
    """A cost that every layer pays at its precision. Implementations are frozen dataclasses of their options."""

    name: ClassVar[str]
    unit: ClassVar[str]
    reduce: ClassVar[Literal["sum", "max"]] = "sum"

    @abc.abstractmethod
    def of(self, layer: Layer, precision: Precision) -> float:
        """Cost of one layer in `unit`s, per image where it depends on the input."""

    def total(self, layers: Mapping[Layer, Precision]) -> float:
        """Cost of a whole assignment: the sum, or the largest, over its layers."""
        costs = [self.of(layer, precision) for layer, precision in layers.items()]
        return math.fsum(costs) if self.reduce == "sum" else max(costs, default=0.0)

    def at(self, space: Space, assignment: Mapping[str, Precision]) -> float:
        """Cost of `assignment` (layer name -> precision) over the layers of `space`."""
        return self.total({layer: assignment[layer.name] for layer in space.layers})


_DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_AMOUNT = re.compile(r"([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(ki|mi|gi|k|m|g|t)?(bops|b)?", re.IGNORECASE)
_WIDTH = re.compile(r"w([0-9]*\.?[0-9]+)(?:a([0-9]*\.?[0-9]+))?", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """A cost and the most of it that is allowed.

    `limit` is a number in the cost's unit, an amount such as `"6.7MiB"`, `"500kB"`, `"75G"`, or relative to a uniform
    width: `"w4"`, `"w4a4"`, `"w3.5"` is the cost of the space with every unit at that width, whatever its menu, and pinned
    units at their pins; widths between whole ones are interpolated.
    """

    cost: AbstractCost
    limit: float | str

    def resolve(self, space: Space) -> float:
        """The limit in the cost's unit; raises `BudgetError` for a limit that cannot be read or is not positive."""
        limit = self.limit
        if isinstance(limit, str):
            width = _WIDTH.fullmatch(limit.strip())
            if width is not None:
                return self._uniform(space, float(width[1]), float(width[2]) if width[2] else None)
            limit = parse_amount(limit)
        if not (isinstance(limit, (int, float)) and math.isfinite(limit) and limit > 0):
            raise BudgetError(f"the limit of {self.cost.name} must be a positive amount, not {self.limit!r}.")
        return float(limit)

    def _uniform(self, space: Space, weight: float, activation: float | None) -> float:
        total = 0.0
        largest = 0.0
        for unit in space.units:
            for name in unit.layers:
                layer = space.layer(name)
                if any(member in space.pins for member in unit.layers):
                    cost = self.cost.of(layer, unit.choices[0])
                else:
                    widest = max(choice.activation for choice in unit.choices)
                    cost = self._interpolated(layer, weight, widest if activation is None else activation)
                total, largest = total + cost, max(largest, cost)
        return total if self.cost.reduce == "sum" else largest

    def _interpolated(self, layer: Layer, weight: float, activation: float) -> float:
        def corners(bits: float) -> list[tuple[int, float]]:
            low = math.floor(bits)
            return [(low, 1.0)] if bits == low else [(low, low + 1 - bits), (low + 1, bits - low)]

        return math.fsum(
            w_share * a_share * self.cost.of(layer, Precision(w, a))
            for w, w_share in corners(weight)
            for a, a_share in corners(activation)
        )


def parse_amount(text: str) -> float:
    """`"6.7MiB"` -> 7025459.2, `"500kB"` -> 500000.0, `"75G"` -> 75e9; raises `BudgetError`."""
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        raise BudgetError(
            f"cannot read the amount {text!r}. Write a number with k, M, G or Ki, Mi, Gi and an optional B, such as 6.7MiB, "
            "500kB or 75G, or a uniform width such as w4 or w4a8."
        )
    factor = (match[2] or "").lower()
    return float(match[1]) * (_BINARY.get(factor) or _DECIMAL[factor])


def format_amount(value: float, unit: str) -> str:
    """A cost as people write it: `6.70 MiB`, `74.4 G BOPs`, `812 B`."""
    if unit == "B":
        for factor, name in ((2**20, "MiB"), (2**10, "KiB")):
            if abs(value) >= factor:
                return f"{value / factor:.4g} {name}"
        return f"{value:.0f} B"
    for power, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.4g} {name}{unit}"
    return f"{value:.4g} {unit}"
