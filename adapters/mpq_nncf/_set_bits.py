"""Other bits for a prepared module, in place."""

from __future__ import annotations

from torch import nn

from mpq_nncf import _nncf_internals as internals
from mpq_nncf._groups import check_groups
from mpq_nncf._wiring import Wiring, wiring_of
from mpq_plugins._adapter import attach_bits, bits_of
from mpq_plugins._bits import BitConfig
from mpq_plugins._errors import AdapterError, FingerprintError
from mpq_plugins._layers import unknown_layer


def set_bits(module: nn.Module, bits: BitConfig) -> nn.Module:
    """Switch every quantizer to the width that `bits` asks for; ranges stay as calibrated.

    Prepare with `weight_range="max"` for a search: the range of least squared error belongs to one width. Bias correction
    and batch-normalisation statistics also stay those of the prepared bits.
    Raises `UnknownLayerError`, `FingerprintError` and `AdapterError` before anything is changed.
    """
    wiring = wiring_of(module)
    for name in bits.layers:
        if name not in wiring:
            raise unknown_layer(name, list(wiring))
    if bits.fingerprint != bits_of(module).fingerprint:
        raise FingerprintError("the bits are for another model than this module was prepared from. Allocate for this model.")
    missing = sorted(set(wiring) - set(bits.layers))
    if missing:
        raise AdapterError(f"no bits are given for {', '.join(missing)}, which the module has quantized. Give them too.")
    check_groups(_sharing(wiring), bits.layers)
    for name, layer in wiring.items():
        for hooks, width in ((layer.weight, bits[name].weight), (layer.activation, bits[name].activation)):
            for hook in hooks:
                internals.set_quantizer_bits(internals.quantizer_at(module, hook), width)
    return attach_bits(module, bits)


def _sharing(wiring: Wiring) -> tuple[tuple[str, ...], ...]:
    readers: dict[str, list[str]] = {}
    for name, layer in wiring.items():
        for hook in layer.activation:
            readers.setdefault(hook, []).append(name)
    return tuple(tuple(names) for names in readers.values() if len(names) > 1)
