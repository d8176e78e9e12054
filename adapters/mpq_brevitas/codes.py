"""Integer weight codes of a quantized module."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mpq_brevitas import internals as brevitas
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.errors import AdapterError


def codes(module: nn.Module) -> dict[str, np.ndarray]:
    """Layer name -> integer codes, in the shape of the float weight."""
    with brevitas.guarded(), torch.no_grad():
        return {
            name: module.get_submodule(name).quant_weight().int().cpu().numpy().astype(np.int64)
            for name in bits_of(check_quantized_weights(module)).layers
        }


def check_quantized_weights(module: nn.Module) -> nn.Module:
    """The module itself; refuses one whose weights are left unquantized: it has no weight codes."""
    for name in bits_of(module).layers:
        if not brevitas.is_quantized_layer(module.get_submodule(name)):
            raise AdapterError(
                f"the weight of {name} is left unquantized, so it has no codes. Call use_float_weights(module, False) first."
            )
    return module
