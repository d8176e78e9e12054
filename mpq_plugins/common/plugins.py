"""Names of proxies, costs, solvers and adapters -> the objects themselves, through entry points, imported on use."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from mpq_plugins.common.files import plain_value
from mpq_plugins.errors import MissingExtraError, PluginError

Kind = Literal["proxies", "costs", "solvers", "adapters"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)


def names(kind: Kind) -> tuple[str, ...]:
    """The registered names of a kind, sorted."""
    return tuple(sorted({point.name for point in importlib.metadata.entry_points(group=f"mpq_plugins.{kind}")}))


def make(kind: Kind, name: str, options: Mapping[str, Any] | None = None) -> Any:
    """The plugin registered under `name`, built with `options`.

    Raises `PluginError` for an unknown name or option, `MissingExtraError` when its dependencies are not installed.
    """
    points = {point.name: point for point in importlib.metadata.entry_points(group=f"mpq_plugins.{kind}")}
    if name not in points:
        close = difflib.get_close_matches(name, points, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise PluginError(f"no {kind} plugin is named {name!r}.{hint} There are: {', '.join(sorted(points)) or 'none'}.")
    try:
        factory = points[name].load()
    except ImportError as error:
        raise MissingExtraError(
            f"{kind} plugin {name!r} needs the package {error.name!r}, which is not installed. "
            f"Install it: pip install 'mpq-plugins[{name if kind == 'adapters' else 'all'}]'."
        ) from error
    except AttributeError as error:
        raise PluginError(f"{kind} plugin {name!r} points to {points[name].value}, which does not exist: {error}.") from error
    _check_options(name, factory, options or {})
    try:
        return factory(**(options or {}))
    except TypeError as error:
        fields = [field.name for field in dataclasses.fields(factory)] if dataclasses.is_dataclass(factory) else []
        raise PluginError(f"{name}: {error}. Its options are: {', '.join(fields) or 'none'}.") from error


def resolve(kind: Kind, given: Any, options: Mapping[str, Any] | None = None) -> Any:
    """The plugin that a user named, or gave as a class or as an object; `options` are those of a name.

    Raises what `make` raises, and `PluginError` for anything else.
    """
    if isinstance(given, str):
        return make(kind, given, options)
    base = _base(kind)
    if isinstance(given, type) and issubclass(given, base):
        try:
            return given()
        except TypeError as error:
            raise PluginError(f"{given.__name__} cannot be made without options: {error}. Give an object of it.") from error
    if isinstance(given, base):
        return given
    raise PluginError(
        f"{str(given)[:80]!r} ({type(given).__name__}) is none of the {kind}. Give a name ({', '.join(names(kind))}), or an "
        f"object of a class derived from {base.__name__}."
    )


def described(plugin: Any) -> dict[str, Any]:
    """What a plugin says of itself, as plain JSON values: its text, what it offers, its options with defaults and values."""
    kind = type(plugin)
    facts: dict[str, Any] = {"about": inspect.cleandoc(kind.__doc__ or "")}
    for name in ("formats", "weight_bits", "activation_bits"):
        if hasattr(kind, name):
            facts[name] = list(getattr(kind, name))
    if isinstance(getattr(kind, "unit", None), str):
        facts["unit"] = kind.unit
    fields = dataclasses.fields(plugin) if dataclasses.is_dataclass(plugin) else ()
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # a type that only a type checker can see
        hints = {}
    facts["options"] = {
        field.name: {
            "default": plain_value(getattr(plugin, field.name)),
            "takes": _shown(hints[field.name]) if field.name in hints else str(field.type),
        }
        for field in fields
    }
    return facts


def _base(kind: Kind) -> type:
    """The class that plugins of a kind derive from."""
    home, name = {
        "proxies": ("proxies.base", "AbstractProxy"),
        "costs": ("costs.base", "AbstractCost"),
        "solvers": ("solvers.base", "AbstractSolver"),
        "adapters": ("adapter.base", "AbstractAdapter"),
    }[kind]
    base: type = getattr(importlib.import_module(f"mpq_plugins.{home}"), name)
    return base


def _check_options(name: str, factory: Any, options: Mapping[str, Any]) -> None:
    """Refuse values that the field of an option does not take: text for a number, a word that is none of its words."""
    if not dataclasses.is_dataclass(factory):
        return
    with contextlib.suppress(NameError):  # a type that only a type checker can see
        hints = typing.get_type_hints(factory)
        for field in dataclasses.fields(factory):
            if field.name in options and not _takes(hints[field.name], options[field.name]):
                wanted, given = _shown(hints[field.name]), options[field.name]
                raise PluginError(f"{name}: {field.name} must be {wanted}, not {given!r}. Its default is {field.default!r}.")


def _takes(hint: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_takes(argument, value) for argument in arguments)
    if origin is Callable:
        return callable(value)
    if hint in (int, float):  # True is an int to Python, and a whole number is as good as a float.
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)


def _shown(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin is Callable:
        return "a function"
    if arguments:
        return " or ".join(map(_shown, arguments))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return words.get(hint, str(hint))


def require(package: str, extra: str) -> Any:
    """Import an optional package; raises `MissingExtraError` with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{package} is needed for this and is not installed. Install it: pip install 'mpq-plugins[{extra}]'."
        ) from error
