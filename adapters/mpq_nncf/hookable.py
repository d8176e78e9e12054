"""A model in a form that NNCF's hooks can be attached to."""

from __future__ import annotations

from typing import Any

from torch import nn


class _Chain(nn.Module):
    """The children of an `nn.Sequential` under their own names, without its iteration over every child."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self._order = tuple(chain._modules)
        for name, child in chain._modules.items():
            self.add_module(name, child)
        self.train(chain.training)

    def forward(self, input: Any) -> Any:  # the name by which a Sequential may be called
        value = input
        for name in self._order:
            value = self._modules[name](value)  # type: ignore[misc]  # children of a Sequential are modules
        return value


def as_hookable(model: nn.Module) -> nn.Module:
    """`model` itself, or for a top-level `nn.Sequential` a module with the same children, names and result.

    NNCF stores its hooks as one more child, and a Sequential would call that child.
    """
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        return _Chain(model)
    return model
