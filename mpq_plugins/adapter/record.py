"""What a prepared module carries with it: its bits, its origin, and what its adapter needs again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

RECORD = "_mpq_record"  # the one attribute of ours on a prepared module: name -> what is known of it


def record(module: nn.Module, **facts: Any) -> nn.Module:
    """Let a prepared module carry facts that its adapter needs again; deepcopy keeps them."""
    object.__setattr__(module, RECORD, {**getattr(module, RECORD, {}), **facts})
    return module


def recorded_fact(module: Any, name: str) -> Any:
    """A fact that `record` left on a module, inside wrappers too; None where there is none."""
    return getattr(prepared_inside(module), RECORD, {}).get(name)


def prepared_inside(module: Any) -> Any:
    """The prepared module inside wrappers that change nothing: of torch, of this package, and a sequence of one."""
    from torch import nn

    from mpq_plugins.model.check import unwrapped

    while True:
        inside = unwrapped(module)
        if not hasattr(inside, RECORD) and type(inside) is nn.Sequential and len(inside) == 1:
            inside = inside[0]
        if inside is module:
            return module
        module = inside
