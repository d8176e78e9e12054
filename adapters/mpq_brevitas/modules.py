"""Finding and replacing the layers of a model by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from mpq_plugins.model.discover import LAYER_TYPES

ROOT = "weight"  # what `find_layers` calls a model that is itself a layer


class RootLayer(nn.Module):
    """A model that is itself a layer, as a module that holds it: a layer can only be replaced inside something."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = layer

    def forward(self, *args: object, **kwargs: object) -> object:
        """The layer's own result."""
        return self.weight(*args, **kwargs)


def rooted(model: nn.Module) -> nn.Module:
    """`model`, wrapped if it is itself a layer; layer names stay what `find_layers` says."""
    return RootLayer(model) if isinstance(model, LAYER_TYPES) else model


def get_layer(model: nn.Module, name: str) -> nn.Module:
    """The module called `name`."""
    return model.get_submodule(name)


def set_layer(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` points."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def aliases(model: nn.Module) -> dict[str, str]:
    """Later names of modules that are registered more than once -> their first name."""
    first: dict[int, str] = {}
    later = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(id(module), name) != name:
            later[name] = first[id(module)]
    return later


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Later names of parameters that are registered more than once -> their first name."""
    first: dict[int, str] = {}
    later = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            later[name] = first[id(parameter)]
    return later


def tie_parameters(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Make every later name refer to the parameter of its first name again."""
    for later, first in ties.items():
        owner, _, attribute = later.rpartition(".")
        parameter = model.get_parameter(first)
        if getattr(model.get_submodule(owner), attribute) is not parameter:
            setattr(model.get_submodule(owner), attribute, parameter)


@contextlib.contextmanager
def given_by_position(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Have the named layers be given their input by position where the model gives it by keyword.

    Brevitas' rounding methods, and hooks in general, see positional arguments only.
    """

    def positional(_layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (*args, *keywords.values()), {}

    handles = [get_layer(model, name).register_forward_pre_hook(positional, with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
