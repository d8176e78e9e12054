"""The bit-widths of one layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from mpq_plugins.common.files import check_keys
from mpq_plugins.common.text import words_of
from mpq_plugins.errors import PrecisionError

WEIGHT_BITS = range(1, 9)
ACTIVATION_BITS = range(2, 9)
_DIGITS = frozenset(map(str, range(1, 9)))
_TEXT = re.compile(r"w([0-9]{1,3})(?:a([0-9]{1,3}))?")


@dataclass(frozen=True, order=True)
class Precision:
    """Bit-widths of a layer's weight (1 to 8; 1 is binary, for some adapters) and of the activation it reads (2 to 8).

    Raises `PrecisionError` for anything else.

    Example:
        >>> mpq.Precision.parse("w4a8"), str(mpq.Precision(2, 4))
        (Precision(weight=4, activation=8), 'w2a4')
    """

    weight: int
    activation: int

    def __post_init__(self) -> None:
        for what, bits, allowed in (("weight", self.weight, WEIGHT_BITS), ("activation", self.activation, ACTIVATION_BITS)):
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

    def to_json(self) -> dict[str, int]:
        """Both widths by name, as files of ours hold them."""
        return {"weight": self.weight, "activation": self.activation}

    @classmethod
    def from_json(cls, document: Any, *, where: str) -> Precision:
        """Inverse of `to_json`; raises `FormatError` and `PrecisionError`.

        Also reads the pairs `[4, 8]` of checkpoints and the texts `"w4a8"` of training folders that release 0.1 wrote.
        """
        if isinstance(document, list) and len(document) == 2:
            document = dict(zip(("weight", "activation"), document, strict=True))
        keys = {"weight", "activation"}
        try:
            if isinstance(document, str):
                return cls.parse(document)
            check_keys(document, allowed=keys, required=keys, where=where)
            return cls(document["weight"], document["activation"])
        except PrecisionError as error:
            raise PrecisionError(f"{where}: {error}") from error

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"


Width = Precision | str | int
"""One precision as users write it: see `Precision.of`."""

Menu = Iterable[Width] | Width
"""Candidate precisions as users write them: see `as_menu`."""

Widths = Iterable[int | str] | int | str
"""Bit-widths as users write them: see `widths`."""


def widths(given: Widths) -> tuple[int, ...]:
    """Bit-widths as users write them: `(2, 4, 8)`, `range(2, 9)`, `4` or `"2,4,8"`; raises `PrecisionError`."""
    found: Any = words_of(given) if isinstance(given, str) else [given] if isinstance(given, Integral) else given
    try:
        return tuple(int(width) if isinstance(width, str) else width for width in found)
    except (TypeError, ValueError) as error:
        raise PrecisionError(f"{given!r} is no list of bits. Write whole numbers joined by commas, such as 2,3,4,8.") from error


def menu(weight: Widths = range(2, 9), activation: Widths = (8,)) -> tuple[Precision, ...]:
    """Every pair of the given `weight` and `activation` bits, in ascending order, without repeats; raises `PrecisionError`.

    Example:
        >>> [str(precision) for precision in mpq.menu((2, 4), "4,8")]
        ['w2a4', 'w2a8', 'w4a4', 'w4a8']
    """
    activations = widths(activation)
    return tuple(sorted({Precision(w, a) for w in widths(weight) for a in activations}))


def as_menu(given: Menu) -> tuple[Precision, ...]:
    """Choices as users write them: `(2, 4, 8)`, `("w4a4", "w8a8")`, `"2,4,8"`, one precision; raises `PrecisionError`."""
    if isinstance(given, str):
        given = words_of(given)
    elif isinstance(given, (Precision, Integral)):
        given = (given,)
    if not isinstance(given, Iterable):
        raise PrecisionError(f"{given!r} is no menu of precisions. Give a list such as (2, 4, 8) or ('w4a8', 'w8a8').")
    return tuple(map(Precision.of, given))
