"""A module in the form that exporters trace: tensors in by position, a tuple of tensors out."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from mpq_plugins.errors import AdapterError
from mpq_plugins.model.run import device_of, tensors, to_device


class _Positional(nn.Module):
    def __init__(self, module: nn.Module, keys: tuple[str, ...], fixed: dict[str, Any]) -> None:
        super().__init__()
        self.module = module
        self._keys, self._fixed = keys, fixed

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        if self._keys:
            result = self.module(**dict(zip(self._keys, values, strict=True)), **self._fixed)
        else:
            result = self.module(*values)
        return tuple(tensors(result))


def positional(module: nn.Module, example: Any) -> tuple[nn.Module, tuple[Tensor, ...], tuple[str, ...]]:
    """The module wrapped for tracing, its example tensors, and a name for each of them."""
    example = to_device(example, device_of(module))
    if isinstance(example, dict):
        given = {key: value for key, value in example.items() if isinstance(value, Tensor)}
        fixed = {key: value for key, value in example.items() if key not in given}
        return _Positional(module, tuple(given), fixed).eval(), tuple(given.values()), tuple(given)
    values = tuple(example) if isinstance(example, (tuple, list)) else (example,)
    if not all(isinstance(value, Tensor) for value in values):
        raise AdapterError("positional inputs of an exported model must be tensors. Give the example as a dict of keywords.")
    return _Positional(module, (), {}).eval(), values, _names(module, len(values))


def _names(module: nn.Module, n_inputs: int) -> tuple[str, ...]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds][:n_inputs]
    return tuple(names) if len(names) == n_inputs else tuple(f"input_{index}" for index in range(n_inputs))
