"""Other bits for a prepared module, in place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.activation_range import fit, measured
from mpq_nncf.advice import check_precisions
from mpq_nncf.groups import check_groups
from mpq_nncf.ptq import ptq_of
from mpq_nncf.weight_range import fit_weight_ranges
from mpq_nncf.wiring import Wiring, wiring_of
from mpq_plugins.adapter.base import attach_bits, bits_of, check_switch
from mpq_plugins.errors import AdapterError
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
    fit_weight_ranges(module, [wiring[name] for name in reweighted], method=ptq_of(module).weight_range)
    fit(module, histograms, method=ptq_of(module).activation_range)
    return attach_bits(module, bits)


def first_places(module: nn.Module, hooks: Iterable[str]) -> list[str]:
    """One of `hooks` for each quantizer: those of joined inputs stand in several places."""
    places: dict[int, str] = {}
    for hook in hooks:
        places.setdefault(id(nncf_quantizers.quantizer_at(module, hook)), hook)
    return list(places.values())


def _check(wiring: Wiring, bits: BitConfig, old: BitConfig) -> None:
    check_switch(old, bits)
    check_precisions(bits.layers)
    check_groups(_sharing(wiring), bits.layers)
    _check_weights(wiring, bits)


def _check_weights(wiring: Wiring, bits: BitConfig) -> None:
    first: dict[str, str] = {}
    for name, layer in wiring.items():
        holder = first.setdefault(layer.parameter, name)
        if bits[name].weight != bits[holder].weight:
            raise AdapterError(
                f"{name} and {holder} hold the same weight but ask for {bits[name].weight} and {bits[holder].weight} "
                f"weight bits. Tie them: tie=[({holder!r}, {name!r})]."
            )


def _sharing(wiring: Wiring) -> tuple[tuple[str, ...], ...]:
    readers: dict[str, list[str]] = {}
    for name, layer in wiring.items():
        for hook in layer.activation:
            readers.setdefault(hook, []).append(name)
    return tuple(tuple(names) for names in readers.values() if len(names) > 1)
