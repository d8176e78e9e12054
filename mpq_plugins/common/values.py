"""Whether a value fits the type of the field that takes it: options of plug-ins, recipes, records in files."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from mpq_plugins.errors import MPQError


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The range of a finite number, beside its type: `Annotated[float, Bounds(least=0, below=1)]`."""

    least: float | None = None
    above: float | None = None
    below: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number is finite and within them."""
        return (
            math.isfinite(value)
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        ends = (("of at least", self.least), ("above", self.above), ("below", self.below))
        return " and ".join(f"{words} {end}" for words, end in ends if end is not None)


Count = Annotated[int, Bounds(least=0)]
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "none",
    list: "a list",
    dict: "an object",
}


def takes(hint: Any, value: Any) -> bool:
    """Whether a field of type `hint` takes `value`: true is no whole number, a whole number is as good as a float.

    Lists are as good as tuples. Types that cannot be checked take anything.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return takes(arguments[0], value) and all(bounds.hold(value) for bounds in arguments[1:])
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(takes(argument, value) for argument in arguments)
    if origin is Callable:
        return callable(value)
    if origin is tuple:  # tuple[X, ...]
        return isinstance(value, (tuple, list)) and all(takes(arguments[0], item) for item in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def shown(hint: Any) -> str:
    """What a field of type `hint` takes, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return " ".join([shown(arguments[0]), *map(str, arguments[1:])])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is Callable:
        return "a function"
    if origin is tuple:
        return f"a list, each {shown(arguments[0])}"
    if arguments:
        return " or ".join(map(shown, arguments))
    return _WORDS.get(hint, str(hint))


def hints_of(record: type) -> dict[str, Any]:
    """The types of the fields of a dataclass; none where only a type checker can see one of them."""
    try:
        return typing.get_type_hints(record, include_extras=True)
    except NameError:
        return {}


def check_values(record: type, values: Mapping[str, Any], error: type[MPQError], *, where: str = "") -> None:
    """Refuse values that the fields of the dataclass `record` do not take; raises `error` naming field, value and types."""
    hints = hints_of(record)
    for field in dataclasses.fields(record):
        if field.name in values and field.name in hints and not takes(hints[field.name], values[field.name]):
            default = "" if field.default is dataclasses.MISSING else f" Its default is {field.default!r}."
            raise error(
                f"{where and where + ': '}{field.name} must be {shown(hints[field.name])}, not "
                f"{repr(values[field.name])[:60]}.{default}"
            )
