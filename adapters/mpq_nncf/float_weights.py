"""Weights left unquantized for a while, in place."""

from __future__ import annotations

from torch import nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.ptq import ptq_of
from mpq_nncf.weight_range import fit_weight_ranges
from mpq_nncf.wiring import wiring_of


def use_float_weights(module: nn.Module, *, on: bool) -> nn.Module:
    """Let the weight quantizers of `module` return their input, or quantize again; returns the module.

    Bits and the keys of the state dict stay; quantizers that begin again get ranges for what the weights have become. Codes,
    checkpoints and exported files are those of the quantized weights all along.
    """
    beginning = []
    for layer in wiring_of(module).values():
        quantizers = [nncf_quantizers.quantizer_at(module, hook) for hook in layer.weight]
        if not on and any(nncf_quantizers.passes_through(quantizer) for quantizer in quantizers):
            beginning.append(layer)
        for quantizer in quantizers:
            nncf_quantizers.pass_through(quantizer, on=on)
    fit_weight_ranges(module, beginning, method=ptq_of(module).weight_range)
    return module
