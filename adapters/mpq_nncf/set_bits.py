"""Other bits for a prepared module, or its weights left unquantized for a while, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.groups import check_groups
from mpq_nncf.ranges import first_places, fit, fit_weight_ranges, measured
from mpq_nncf.wiring import LayerWiring, Wiring, wiring_of
from mpq_plugins.adapter.base import attach_bits, bits_of, check_switch
from mpq_plugins.adapter.checks import TIE, check_agreement
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.record import recorded_fact
from mpq_plugins.model.run import Batch, batches_of
from mpq_plugins.quantizers.batch_norm import corrected_around, norm_sites
from mpq_plugins.space.bits import BitConfig


def set_bits(module: nn.Module, bits: BitConfig, calibration: Iterable[Any], batch_norm: str) -> nn.Module:
    """See `AbstractAdapter.set_bits`; biases stay those of the bits before."""
    wiring = wiring_of(module)
    _check(wiring, bits, bits_of(module))
    batches = tuple(batches_of(calibration))
    if bits.layers == bits_of(module).layers or batch_norm == "kept":
        return _switch(module, bits, batches)
    with corrected_around(module, batches, lambda: norm_sites(module)):
        return _switch(module, bits, batches)


def _switch(module: nn.Module, bits: BitConfig, batches: Sequence[Batch]) -> nn.Module:
    wiring, old = wiring_of(module), bits_of(module)
    reweighted = [name for name in wiring if bits[name].weight != old[name].weight]
    widths = {
        hook: bits[name].activation
        for name, layer in wiring.items()
        for hook in layer.activation
        if bits[name].activation != old[name].activation
    }
    inputs = [batch.inputs for batch in batches] if widths else []
    places = {hook: widths[hook] for hook in first_places(module, widths)}
    histograms = measured(module, places, inputs) if inputs else {}
    for name in reweighted:
        for hook in wiring[name].weight:
            nncf_quantizers.set_quantizer_bits(nncf_quantizers.quantizer_at(module, hook), bits[name].weight)
    for hook, width in widths.items():
        nncf_quantizers.set_quantizer_bits(nncf_quantizers.quantizer_at(module, hook), width)
    fit_weight_ranges(module, [wiring[name] for name in reweighted], method=_ptq_of(module).weight_range)
    fit(module, histograms, method=_ptq_of(module).activation_range)
    return attach_bits(module, bits)


def _check(wiring: Wiring, bits: BitConfig, old: BitConfig) -> None:
    check_switch(old, bits)
    check_groups(_sharing(wiring, lambda layer: layer.activation), bits.layers)
    check_agreement(_sharing(wiring, lambda layer: [layer.parameter]), bits.layers, "weight", TIE)


def use_float_weights(module: nn.Module, on: bool) -> nn.Module:
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
    fit_weight_ranges(module, beginning, method=_ptq_of(module).weight_range)
    return module


def _ptq_of(module: nn.Module) -> PTQ:
    # Checkpoints of the first release do not say how ranges were fitted.
    return recorded_fact(module, "ptq") or PTQ()


def _sharing(wiring: Wiring, parts: Callable[[LayerWiring], Iterable[str]]) -> list[list[str]]:
    """The layers of each of their `parts`."""
    readers: dict[str, list[str]] = {}
    for name, layer in wiring.items():
        for part in parts(layer):
            readers.setdefault(part, []).append(name)
    return list(readers.values())
