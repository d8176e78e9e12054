"""What a prepared module carries with it: its bits, its origin, and what its adapter needs again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
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


@dataclass(frozen=True)
class Origin:
    """How a module came about, as far as another command must know: plain JSON facts, and an example of its input.

    `facts` are the `options` of its adapter, and the `command` that made it: option name -> value, empty outside the
    command line.
    """

    facts: Mapping[str, Any]
    example: Any

    @classmethod
    def of(cls, adapter: Any, example: Any, command: Mapping[str, Any] | None = None) -> Origin:
        """The origin of a module of `adapter`, whose options are those of a dataclass."""
        options: dict[str, Any] = asdict(adapter) if is_dataclass(adapter) and not isinstance(adapter, type) else {}
        return cls({"options": options, "command": dict(command or {})}, example)
