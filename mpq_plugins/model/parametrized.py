"""Parametrizations (`torch.nn.utils.parametrize`) before a module is written to a file."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def without_parametrizations(module: nn.Module) -> nn.Module:
    """Put in place of every parametrization the tensor that it computes, in place; returns the module.

    Files need that tensor only, and few formats have what computes it, such as the products of spectral normalisation.
    Copies of the module stay whole: torch's own removal takes the property from the class that they share.
    """
    for child in list(module.modules()):
        if not parametrize.is_parametrized(child):
            continue
        kept: nn.ModuleDict = child._modules["parametrizations"]  # type: ignore[assignment]  # there is one
        computed = {name: getattr(child, name).detach().clone() for name in kept}
        learned = {name for name in kept if next(kept[name].parameters(recurse=False), None) is not None}
        child.__class__ = parametrize.type_before_parametrizations(child)
        del child._modules["parametrizations"]
        for name, value in computed.items():
            if name in learned:
                child.register_parameter(name, nn.Parameter(value, requires_grad=value.is_floating_point()))
            else:
                child.register_buffer(name, value)
    return module
