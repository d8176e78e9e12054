"""What a precision costs, and how much of it a user allows."""

from __future__ import annotations

import abc
import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

from mpq_plugins.common.files import plain_value
from mpq_plugins.common.plugins import Kind, Plugin, resolve
from mpq_plugins.errors import BudgetError, MPQError
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision
from mpq_plugins.space.space import Space


class AbstractCost(Plugin, abc.ABC):
    """A cost that every layer pays at its precision. Implementations are frozen dataclasses of their options.

    Example:
        >>> class Reads(mpq.AbstractCost):
        ...     name, unit = "reads", "bit"
        ...     def of(self, layer, precision):
        ...         return layer.n_input_elements * precision.activation
        >>> mpq.Budget(Reads(), "60%").cost.name
        'reads'
    """

    plugin_kind: ClassVar[Kind] = "costs"
    name: ClassVar[str]
    unit: ClassVar[str]
    reduce: ClassVar[Literal["sum", "max"]] = "sum"

    @abc.abstractmethod
    def of(self, layer: Layer, precision: Precision) -> float:
        """Cost of one layer in `unit`s, per image where it depends on the input."""

    def total(self, layers: Mapping[Layer, Precision]) -> float:
        """Cost of a whole assignment: the sum, or the largest, over its layers."""
        costs = [cost_of(self, layer, precision) for layer, precision in layers.items()]
        return math.fsum(costs) if self.reduce == "sum" else max(costs, default=0.0)

    def at(self, space: Space, assignment: Mapping[str, Precision]) -> float:
        """Cost of `assignment` (layer name -> precision) over the layers of `space`."""
        return self.total({layer: assignment[layer.name] for layer in space.layers})


def cost_of(cost: AbstractCost, layer: Layer, precision: Precision) -> float:
    """What `cost` says of a layer, checked; raises `BudgetError` where it fails or gives no amount."""
    try:
        found = cost.of(layer, precision)
    except MPQError:
        raise
    except Exception as error:  # a user's own formula, or a table with holes
        raise BudgetError(
            f"the cost {cost.name} fails for {layer.name} at {precision}: {type(error).__name__}: {error}. Let it cover every "
            "layer and precision of the search, or search fewer of them."
        ) from error
    if not _is_amount(found) or float(found) < 0:
        raise BudgetError(
            f"the cost {cost.name} of {layer.name} at {precision} is {found!r}; it must be a finite number of at least 0."
        )
    return float(found)


def options_of(cost: AbstractCost) -> dict[str, Any]:
    """The options of a cost as plain JSON values, as far as they have any; the rest by their texts."""
    if not dataclasses.is_dataclass(cost):
        return {}
    return {field.name: plain_value(getattr(cost, field.name)) for field in dataclasses.fields(cost)}


def _is_amount(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))


_DECIMAL = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_BINARY = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_SI = {"n": 1e-9, "u": 1e-6, "µ": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NUMBER = r"([0-9]{0,30}\.?[0-9]{1,30}(?:e[+-]?[0-9]{1,3})?)"
_AMOUNT = re.compile(_NUMBER + r"\s*(ki|mi|gi|k|m|g|t)?(bops|b)?", re.IGNORECASE)
_WIDTH = re.compile(r"w([0-9]{0,3}\.?[0-9]{1,6})(?:a([0-9]{0,3}\.?[0-9]{1,6}))?", re.IGNORECASE)
_SHARE = re.compile(_NUMBER + r"\s*(%|bits|x)", re.IGNORECASE)
_FLOAT_BITS = 32


@dataclass(frozen=True)
class Budget:
    """A cost and the most of it that is allowed.

    Args:
        cost: a cost or its name; `bits` and `compression` are other ways to say `size`.
        limit: a number in the cost's unit, an amount such as `"6.7MiB"`, `"500kB"`, `"75G"` or `"300us"`, or relative:
            `"w4"`, `"w4a4"`, `"w3.5"` (interpolated): every unit at that width, whatever its menu, pinned units at their pins;
            `"60%"`: a share of every unit at w8a8;
            `"3.5 bits"` on average over the searched weights, `"8x"` smaller than 32-bit floats: for sizes.

    Raises `BudgetError` for a limit that is neither a number nor text.

    Example:
        >>> space = mpq.build_space(torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.zeros(1, 16))
        >>> mpq.Budget("size", "w4").resolve(space), mpq.Budget("size", "16x").resolve(space)  # bytes
        (64.0, 32.0)
    """

    cost: AbstractCost
    limit: float | str

    def __post_init__(self) -> None:
        cost: Any = self.cost
        given: Any = self.limit
        if cost in ("bits", "compression"):
            cost, given = "size", f"{given} bits" if cost == "bits" else f"{str(given).rstrip('xX')}x"
        object.__setattr__(self, "cost", resolve("costs", cost))
        if getattr(given, "shape", None) == () and hasattr(given, "item"):
            given = given.item()  # a number of numpy's or torch's
        if isinstance(given, bool) or not isinstance(given, (Real, str)):
            raise BudgetError(f"the limit of {self.cost.name} must be an amount such as 6.7MiB or w4, not {self.limit!r}.")
        object.__setattr__(self, "limit", given if isinstance(given, (int, str)) else float(given))

    def resolve(self, space: Space) -> float:
        """The limit in the cost's unit; raises `BudgetError` for a limit that cannot be read or is not positive."""
        limit = self._read(space) if isinstance(self.limit, str) else self.limit
        if not (_is_amount(limit) and limit > 0):
            raise BudgetError(f"the limit of {self.cost.name} must be a positive amount, not {_short(self.limit)}.")
        return float(limit)

    def _read(self, space: Space) -> float:
        text = str(self.limit).strip()
        width = _WIDTH.fullmatch(text)
        if width is not None:
            return self._uniform(space, float(width[1]), float(width[2]) if width[2] else None)
        share = _SHARE.fullmatch(text)
        if share is None:
            return parse_amount(text, unit=self.cost.unit)
        amount, kind = float(share[1]), share[2].lower()
        if kind == "%":
            return amount / 100 * self._uniform(space, 8.0, 8.0)
        if self.cost.name != "size":
            raise BudgetError(f"{text!r} says a size of weights, not {self.cost.name}. Write size={text}, or an amount.")
        bits = amount if kind == "bits" else _FLOAT_BITS / (amount or math.inf)
        return space.n_stored_weights * bits / 8

    def _uniform(self, space: Space, weight: float, activation: float | None) -> float:
        total = 0.0
        largest = 0.0
        for unit in space.units:
            for name in unit.layers:
                layer = space.layer(name)
                if any(member in space.pins for member in unit.layers):
                    cost = cost_of(self.cost, layer, unit.choices[0])
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
            w_share * a_share * cost_of(self.cost, layer, Precision(w, a))
            for w, w_share in corners(weight)
            for a, a_share in corners(activation)
        )


def parse_amount(text: str, *, unit: str | None = None) -> float:
    """`"6.7MiB"` -> 7025459.2, `"500kB"` -> 500000.0, `"75G"` -> 75e9; raises `BudgetError`.

    With the `unit` of a cost only that is read, and time, energy and the like with SI prefixes: for "us" `"0.3ms"` -> 300.0.
    """
    match = _AMOUNT.fullmatch(text.strip())
    is_own = unit not in (None, "B", "BOPs")  # such as seconds, where m is milli
    fits = match is not None and (unit is None or (match[3] or "").lower() in ("", unit.lower()))
    if match is not None and fits and not (is_own and match[2] == "m"):
        factor = (match[2] or "").lower()
        return float(match[1]) * (_BINARY.get(factor) or _DECIMAL[factor])
    found = _in_unit(text.strip(), unit) if unit and is_own else None
    if found is not None:
        return found
    own = f" Amounts of this cost are in {unit}." if unit else ""
    raise BudgetError(
        f"cannot read the amount {_short(text)}.{own} Write a number with k, M, G or Ki, Mi, Gi and an optional unit, such as "
        "6.7MiB, 500kB or 75G, or a uniform width such as w4 or w4a8."
    )


def _in_unit(text: str, unit: str) -> float | None:
    """An amount with a unit of its own, in `unit`; None where it has another one."""
    plain = re.compile(_NUMBER + r"\s*" + re.escape(unit))
    if (exact := plain.fullmatch(text)) is not None:
        return float(exact[1])
    own, base = (unit[0], unit[1:]) if len(unit) > 1 and unit[0] in _SI else ("", unit)
    scaled = re.fullmatch(_NUMBER + r"\s*([nuµmkMGT]?)" + re.escape(base), text)
    if scaled is not None:
        return float(scaled[1]) * _SI[scaled[2]] / _SI[own]
    alike = re.fullmatch(plain.pattern, text, re.IGNORECASE)  # after prefixes: MJ is no mJ
    return None if alike is None else float(alike[1])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
