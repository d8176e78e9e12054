"""Layers that NNCF would leave in float."""

from __future__ import annotations

from typing import Any

from torch import nn

from mpq_nncf._groups import traced_copy
from mpq_nncf._wiring import calls_of
from mpq_plugins._layers import Inventory
from mpq_plugins._unread import unread_layers


def unconvertible(model: nn.Module, inventory: Inventory, example: Any = None) -> dict[str, str]:
    """Layer name -> reason.

    A quantizer stands between a parameter and the operation that reads it, so the weight must be a parameter; with an
    `example`, NNCF must also see the operation in its own trace.
    """
    parameters = {name for name, _ in model.named_parameters()}
    reasons = {
        layer.name: "its weight is computed, not a parameter, so NNCF has no place for a weight quantizer"
        for layer in inventory
        if layer.weight_name not in parameters
    }
    if example is None:
        return reasons
    calls = calls_of(inventory, traced_copy(model, example))
    unseen = {name: "NNCF's trace shows no operation that reads its weight" for name, ops in calls.items() if not ops}
    return {**unread_layers(model, inventory, example), **unseen, **reasons}
