"""Three kinds of parameters, which train at different rates."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mpq_plugins.adapter.base import adapter_of, parameters_of

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(
    module: nn.Module, *, learning_rate: float, weight_decay: float, range_factor: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, named "weights", "norms and biases" and "ranges"; any of them may be empty.

    Weights decay; normalisation parameters, biases and other vectors do not; ranges of quantizers do not, and learn at
    `range_factor` of the rate (PROFIT, section 5). Which are ranges the adapter says that prepared the module; those of
    `DuQ` are in any module. Every trainable parameter is in exactly one group; others are in none.
    """
    adapter = adapter_of(module)
    known = [*(() if adapter is None else adapter.range_parameters(module)), *parameters_of(module, ["mpq_plugins.quantizers"])]
    ranges = {id(parameter) for parameter in known}
    rates = {"weights": (1.0, weight_decay), "norms and biases": (1.0, 0.0), "ranges": (range_factor, 0.0)}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for owner, parameter in _owned(module):
        is_weight = parameter.dim() > 1 and not isinstance(owner, _NORMS)
        members["ranges" if id(parameter) in ranges else "weights" if is_weight else "norms and biases"].append(parameter)
    return [
        {"name": name, "params": members[name], "lr": learning_rate * rate, "weight_decay": decay}
        for name, (rate, decay) in rates.items()
    ]


def _owned(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Parameter]]:
    """Every trainable parameter once, with the first module that holds it."""
    seen: set[int] = set()
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield owner, parameter
