"""Names of proxies, costs, solvers and adapters -> the objects themselves, through entry points, imported on use."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from mpq_plugins.common.files import plain_value
from mpq_plugins.common.text import words_of
from mpq_plugins.common.values import check_values, hints_of, shown
from mpq_plugins.errors import MissingExtraError, PluginError

Kind = Literal["proxies", "costs", "solvers", "adapters"]
KINDS: tuple[Kind, ...] = typing.get_args(Kind)


_BASES = {"proxies": "AbstractProxy", "costs": "AbstractCost", "solvers": "AbstractSolver", "adapters": "AbstractAdapter"}


class Plugin:
    """What can be named, given as a class or given as an object; the abstract base of each kind says which it is."""

    plugin_kind: ClassVar[Kind]


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
    if isinstance(factory, type) and dataclasses.is_dataclass(factory):
        check_values(factory, options or {}, PluginError, where=name)
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
    if isinstance(given, type) and getattr(given, "plugin_kind", None) == kind:
        try:
            return given()
        except TypeError as error:
            raise PluginError(f"{given.__name__} cannot be made without options: {error}. Give an object of it.") from error
    if isinstance(given, Plugin) and given.plugin_kind == kind:
        return given
    raise PluginError(
        f"{str(given)[:80]!r} ({type(given).__name__}) is none of the {kind}. Give a name ({', '.join(names(kind))}), or an "
        f"object of a class derived from {_BASES[kind]}."
    )


def resolve_all(kind: Kind, given: Any) -> tuple[Any, ...]:
    """The plugins of a list, each as `resolve` takes it; one alone, and names joined by commas, are lists too."""
    if isinstance(given, str):
        given = words_of(given)
    elif isinstance(given, (type, Plugin)) or not isinstance(given, Iterable):
        given = (given,)
    return tuple(resolve(kind, item) for item in given)


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
    hints = hints_of(kind)
    facts["options"] = {
        field.name: {
            "default": plain_value(getattr(plugin, field.name)),
            "takes": shown(hints[field.name]) if field.name in hints else str(field.type),
        }
        for field in fields
    }
    return facts


def require(package: str, extra: str) -> Any:
    """Import an optional package; raises `MissingExtraError` with the command that installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{package} is needed for this and is not installed. Install it: pip install 'mpq-plugins[{extra}]'."
        ) from error
