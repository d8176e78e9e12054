"""What the files of a run say already, so that no later command has to be told again."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpq_plugins.adapter.base import AbstractAdapter, check_prepared_with
from mpq_plugins.cli.options import adapter_of
from mpq_plugins.common.plugins import make, names
from mpq_plugins.common.text import values_of
from mpq_plugins.errors import FormatError, MPQError, UsageError
from mpq_plugins.space.bits import BitConfig

_NAMES = ("model", "weights", "data", "input", "negative_padding", "output", "adapter", "adapter_option")
_SPECS = ("model", "data")
_OWN = ("torchvision:", "timm:", "imagefolder:")


def command_of(options: Namespace) -> dict[str, Any]:
    """The options that later commands need again, as they were given."""
    given = {name: getattr(options, name, None) for name in _NAMES}
    return {name: value for name, value in given.items() if value not in (None, [], False)}


def take_over(options: Namespace, known: Any, names: tuple[str, ...] = _NAMES) -> None:
    """Fill in options that were not given with those that a file keeps.

    A file may come from anywhere: of code it may name torchvision's and timm's, and files below the working folder.
    """
    for name in names:
        value = known.get(name) if isinstance(known, Mapping) else None
        if getattr(options, name, None) in (None, [], False) and value is not None and _is_harmless(name, value):
            setattr(options, name, value)


def _is_harmless(name: str, value: Any) -> bool:
    if name == "negative_padding":
        return value is True
    if name == "adapter_option":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not isinstance(value, str):
        return False
    if name not in _SPECS or value == "digits" or value.startswith(_OWN):
        return True
    file, found, _ = value.rpartition(".py:")
    place = Path(f"{file}.py")
    return bool(found) and not place.is_absolute() and ".." not in place.parts


def bits_and_command(options: Namespace) -> BitConfig:
    """The bit configuration of a command, which says what `mpq allocate` was told; raises `UsageError`."""
    bits = BitConfig.load(options.bits_file)
    take_over(options, bits.origin.get("command"))
    for name in ("model", "adapter"):
        require(options, name, options.bits_file)
    return bits


def require(options: Namespace, name: str, file: str) -> None:
    """Raise `UsageError` for an option that was neither given nor is known from `file`."""
    if getattr(options, name) is None:
        raise UsageError(f"{file} does not say which {name} it is for. Add --{name}.")


def adapter_of_module(options: Namespace) -> tuple[AbstractAdapter, Any]:
    """The adapter of a checkpoint and an example of its input (None for older files), with the options it was made with."""
    from mpq_plugins.adapter.checkpoint import read_origin

    name, origin = read_origin(options.module_file)
    if origin is not None:
        wanted = ("data", "weights") if options.evaluate else ()
        take_over(options, origin.facts["command"], ("model", "negative_padding", "output", *wanted))
    require(options, "model", options.module_file)
    own = {} if origin is None else origin.facts["options"]
    given = values_of(options.adapter_option)
    if options.adapter is not None and options.adapter != name:
        own = {}  # the adapter says that the file is another's
    check_prepared_with(own, {key: value for key, value in given.items() if key in own}, options.module_file)
    adapter: AbstractAdapter = make("adapters", options.adapter or name, {**own, **given})
    return adapter, None if origin is None else origin.example


def adapter_of_artifact(options: Namespace) -> AbstractAdapter:
    """The adapter that reads an exported file: the one named, else the first that can."""
    if options.adapter is not None:
        return adapter_of(options)
    reasons = []
    for name in names("adapters"):
        try:
            adapter: AbstractAdapter = make("adapters", name, values_of(options.adapter_option))
            adapter.read_bits(options.artifact)
        except (MPQError, ImportError) as error:
            reasons.append(f"{name}: {error}")
        else:
            return adapter
    raise FormatError(f"no adapter reads {options.artifact}. {' '.join(reasons)}")
