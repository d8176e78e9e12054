"""The bit-widths of one layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral

from mpq_plugins.errors import PrecisionError

WEIGHT_BITS = range(1, 9)
ACTIVATION_BITS = range(2, 9)
_DIGITS = frozenset(map(str, range(1, 9)))
_TEXT = re.compile(r"w([0-9]{1,3})(?:a([0-9]{1,3}))?")


@dataclass(frozen=True, order=True)
class Precision:
    """Bit-widths of a layer's weight and of the activation it reads.

    `weight` is 1..8 (1 means a binary weight, which only some adapters have),
    `activation` is 2..8. Raises `PrecisionError` for anything else.
    """

    weight: int
    activation: int

    def __post_init__(self) -> None:
        for what, bits, allowed in (
            ("weight", self.weight, WEIGHT_BITS),
            ("activation", self.activation, ACTIVATION_BITS),
        ):
            if isinstance(bits, bool) or not isinstance(bits, int) or bits not in allowed:
                raise PrecisionError(
                    f"{what} bits must be a whole number from {allowed[0]} to {allowed[-1]}, not {bits!r}. "
                    "Leave a layer out of the search (exclude it) to keep it in float."
                )

    @classmethod
    def parse(cls, text: str, *, activation: int = 8) -> Precision:
        """Read `w4a8`; `w4` alone takes `activation` bits for the activation."""
        match = _TEXT.fullmatch(text.strip().lower()) if isinstance(text, str) else None
        if match is None:
            raise PrecisionError(f"{text!r} is not a precision. Write it as w4a8, or w4 for the weight alone.")
        return cls(int(match[1]), int(match[2] or activation))

    @classmethod
    def of(cls, given: Precision | str | int) -> Precision:
        """What a user wrote for a precision: itself, `"w4a8"`, or `4`, which means the same as `"w4"`."""
        if isinstance(given, Precision):
            return given
        if isinstance(given, Integral) and not isinstance(given, bool):
            return cls(int(given), 8)
        if isinstance(given, str):
            return cls(int(given), 8) if given.strip() in _DIGITS else cls.parse(given)
        raise PrecisionError(f"{given!r} is not a precision. Write it as w4a8, or 4 or w4 for the weight alone.")

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


def menu(weight: Iterable[int] = range(2, 9), activation: Iterable[int] = (8,)) -> tuple[Precision, ...]:
    """Every pair of the given weight and activation bits, in ascending order, without repeats."""
    weights, activations = tuple(weight), tuple(activation)
    return tuple(sorted({Precision(w, a) for w in weights for a in activations}))


def as_menu(given: Iterable[Precision | str | int] | Precision | str | int) -> tuple[Precision, ...]:
    """Choices as users write them: `(2, 4, 8)`, `("w4a4", "w8a8")`, `"2,4,8"`, one precision; raises `PrecisionError`."""
    if isinstance(given, str):
        given = [word for word in given.split(",") if word.strip()]
    if isinstance(given, (Precision, Integral)):
        given = (given,)
    if not isinstance(given, Iterable):
        raise PrecisionError(f"{given!r} is no menu of precisions. Give a list such as (2, 4, 8) or ('w4a8', 'w8a8').")
    return tuple(map(Precision.of, given))
