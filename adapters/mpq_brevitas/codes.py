"""Integer weight codes of a quantized module."""

from __future__ import annotations

import numpy as np
from torch import nn

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.float_weights import check_quantized_weights
from mpq_brevitas.modules import get_layer
from mpq_plugins.adapter.base import bits_of


def codes(module: nn.Module) -> dict[str, np.ndarray]:
    """Layer name -> integer codes, in the shape of the float weight."""
    with brevitas.guarded():
        return {
            name: brevitas.integer_codes(get_layer(module, name)).cpu().numpy().astype(np.int64)
            for name in bits_of(check_quantized_weights(module)).layers
        }
