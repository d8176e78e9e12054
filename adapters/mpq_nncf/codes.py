"""Integer weight codes of the torch module."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.declaration import Declaration
from mpq_nncf.wiring import LayerWiring, wiring_of


def codes(module: nn.Module) -> dict[str, np.ndarray]:
    """Layer name -> weight codes in [-2^(b-1), 2^(b-1) - 1] as int8, in the shape of the float weight."""
    return {name: layer_codes(module, layer).to(torch.int8).cpu().numpy() for name, layer in wiring_of(module).items()}


def stored_codes(module: nn.Module, declared: Declaration) -> dict[str, np.ndarray]:
    """Codes of the layers that store their own weight."""
    return {name: values for name, values in codes(module).items() if declared.layers[name].stored_as == name}


def layer_codes(module: nn.Module, layer: LayerWiring) -> Tensor:
    """The codes of one layer, as floats."""
    step = nncf_quantizers.weight_step(nncf_quantizers.quantizer_at(module, layer.weight[0]))
    rounded: Tensor = torch.round(quantized_weight(module, layer) / step)
    return rounded


def quantized_weight(module: nn.Module, layer: LayerWiring) -> Tensor:
    """The weight that the layer computes with: codes times step."""
    quantizer = nncf_quantizers.quantizer_at(module, layer.weight[0])
    with torch.no_grad():
        weight: Tensor = nncf_quantizers.quantized(quantizer, module.get_parameter(layer.parameter).detach())
    return weight
