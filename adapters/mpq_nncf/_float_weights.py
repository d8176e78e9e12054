"""Weights left unquantized for a while, in place."""

from __future__ import annotations

from torch import nn

from mpq_nncf import _nncf_quantizers as nncf_quantizers
from mpq_nncf._wiring import wiring_of


def use_float_weights(module: nn.Module, *, on: bool) -> nn.Module:
    """Let the weight quantizers of `module` return their input, or quantize again; returns the module.

    Ranges, bits and the state dict stay. Codes, checkpoints and exported files are those of the quantized weights all along.
    """
    for layer in wiring_of(module).values():
        for hook in layer.weight:
            nncf_quantizers.pass_through(nncf_quantizers.quantizer_at(module, hook), on=on)
    return module
