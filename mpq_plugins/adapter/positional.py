"""A module in the form that exporters trace: tensors in by position, a tuple of tensors out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor, nn

from mpq_plugins.errors import AdapterError
from mpq_plugins.model.run import device_of, tensors, to_device


@final
class Positional(nn.Module):
    """Calls `module` with its tensors under the names `keys`, or by position where there are none."""

    def __init__(self, module: nn.Module, keys: tuple[str, ...], fixed: Mapping[str, Any], plain: Callable[[Any], Any]) -> None:
        super().__init__()
        self.module = module
        self.keys, self._fixed, self._plain = keys, fixed, plain

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the module's result."""
        named = dict(zip(self.keys, values, strict=True)) if self.keys else {}
        result = self.module(*(() if self.keys else values), **named, **self._fixed)
        return tuple(map(self._plain, tensors(self._plain(result))))


def positional(
    module: nn.Module, example: Any, *, plain: Callable[[Any], Any] = lambda value: value
) -> tuple[Positional, tuple[Tensor, ...], tuple[str, ...]]:
    """The module wrapped for tracing and in evaluation mode, its example tensors, and a name for each of them.

    `plain` makes tensors of what the framework returns in their place. Raises `AdapterError` for examples that hold others.
    """
    example = to_device(example, device_of(module))
    if isinstance(example, Mapping):
        given = {key: value for key, value in example.items() if isinstance(value, Tensor)}
        fixed = {key: value for key, value in example.items() if key not in given}
        return Positional(module, tuple(given), fixed, plain).eval(), tuple(given.values()), tuple(given)
    values = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(type(value).__name__ for value in values)
        raise AdapterError(
            f"export takes a tensor, a tuple of tensors or a dict of keywords as example, not ({kinds}). "
            "Give what is no tensor by keyword."
        )
    return Positional(module, (), {}, plain).eval(), values, _names(module, len(values))


def _names(module: nn.Module, n_inputs: int) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds][:n_inputs]
    return tuple(names) if len(names) == n_inputs else tuple(f"input_{index}" for index in range(n_inputs))
