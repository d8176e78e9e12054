"""Forward hooks that are gone again when their block ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from mpq_plugins.model.run import call, evaluating

PreHook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks, given by their handles, at the end."""
    with contextlib.ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


def run_hooked(module: nn.Module, hooks: Iterable[tuple[nn.Module, PreHook]], inputs: Iterable[Any]) -> None:
    """Run `module` on all `inputs` in evaluation mode; each hook sees its part's arguments before every call of it."""
    with hooked(part.register_forward_pre_hook(hook, with_kwargs=True) for part, hook in hooks), evaluating(module):
        for item in inputs:
            call(module, item)


def call_order(module: nn.Module, names: Iterable[str], inputs: Any) -> list[str]:
    """The names of submodules in the order of their calls, one entry a call."""
    order: list[str] = []

    def noting(name: str) -> PreHook:
        return lambda _part, _args, _keywords: order.append(name)

    run_hooked(module, [(module.get_submodule(name), noting(name)) for name in names], [inputs])
    return order
