"""Which parameters are the weight of which layer, in float and in quantized modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mpq_plugins.errors import ModelError

Weights = dict[str, tuple[nn.Parameter, ...]]


def weights_of(module: nn.Module, layers: Iterable[str]) -> Weights:
    """Layer name -> the parameters its weight is made of: one, or several for a parametrized weight.

    Names are those of `find_layers`: adapters keep them, and keep the float weight as a parameter of the layer.
    Raises `ModelError` for a layer without such a weight.
    """
    return {name: _weight(module, name) for name in layers}


def _weight(module: nn.Module, name: str) -> tuple[nn.Parameter, ...]:
    # A functional call has the name of its parameter.
    owner: object = None
    held: object = module
    for part in name.split("."):
        owner, held = held, getattr(held, part, None)
    owner, attribute = (held, "weight") if isinstance(held, nn.Module) else (owner, name.rpartition(".")[2])
    if isinstance(owner, nn.Module) and parametrize.is_parametrized(owner, attribute):
        return tuple(owner.get_submodule(f"parametrizations.{attribute}").parameters())
    weight = getattr(owner, attribute, None)
    if not isinstance(weight, nn.Parameter):
        raise ModelError(
            f"{type(module).__name__} has no layer {name!r} with a weight parameter. Give the module that an adapter "
            "prepared, and the layer names of its bit configuration."
        )
    return (weight,)


def origins(weight: Tensor) -> Iterator[Tensor]:
    """The parameters that a tensor was computed from, nearest first; a parameter is its own origin.

    Found through autograd, hence only with gradients on. This tells whose weight a fake-quantized tensor is, whichever
    framework computed it, for modules, functional calls and tied weights alike.
    """
    if weight.is_leaf:
        yield weight
        return
    pending, seen = [weight.grad_fn], set()
    for node in pending:  # grows while it is read: breadth first
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            yield variable
        pending.extend(following for following, _ in node.next_functions)


def plain(value: object) -> Tensor | None:
    """A tensor itself, the one that a framework's own tensor holds as its `value`, None for others."""
    value = value if isinstance(value, Tensor) else getattr(value, "value", None)
    return value if isinstance(value, torch.Tensor) else None
