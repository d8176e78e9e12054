"""Quantized modules at rest: tensors and JSON text, no pickled classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from torch import nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.hookable import as_hookable
from mpq_nncf.options import attach_options, options_of
from mpq_nncf.options import from_json as options_from_json
from mpq_nncf.options import to_json as options_to_json
from mpq_nncf.ptq import attach_ptq, ptq_of
from mpq_nncf.ptq import from_json as ptq_from_json
from mpq_nncf.ptq import to_json as ptq_to_json
from mpq_nncf.quiet import quiet
from mpq_nncf.wiring import attach_wiring, from_json, to_json, wiring_of
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.checkpoint import check_same_model, read_checkpoint, write_checkpoint
from mpq_plugins.errors import FormatError
from mpq_plugins.model.discover import find_layers

_ADAPTER = "nncf"


def save(module: nn.Module, path: str | Path) -> Path:
    """See `AbstractAdapter.save`."""
    with quiet():
        placement = nncf_quantizers.placement(module)
    contents = {
        "placement": json.dumps(placement),
        "wiring": json.dumps(to_json(wiring_of(module))),
        "ptq": ptq_to_json(ptq_of(module)),
        "options": options_to_json(options_of(module)),
        "state": dict(module.state_dict()),
    }
    return write_checkpoint(path, module, contents, adapter=_ADAPTER)


def has_zero_points(module: nn.Module) -> bool:
    """Whether any activation has a zero point."""
    places = {place for layer in wiring_of(module).values() for place in layer.activation}
    quantizers = [nncf_quantizers.quantizer_at(module, place) for place in places]
    return any(nncf_quantizers.activation_kind(quantizer).asymmetric for quantizer in quantizers)


def load(model: nn.Module, path: str | Path, example: Any) -> nn.Module:
    """See `AbstractAdapter.load`; also raises `FingerprintError` for another model's checkpoint."""
    keys = {"placement", "wiring", "state"}
    bits, document = read_checkpoint(path, keys, adapter=_ADAPTER, optional={"ptq", "options"})  # older ones lack them
    check_same_model(path, bits, find_layers(model, example))
    with quiet():
        module = nncf_quantizers.place(as_hookable(copy.deepcopy(model)), json.loads(document["placement"]))
    try:
        module.load_state_dict(document["state"])
    except RuntimeError as error:
        raise FormatError(
            f"{path} holds other tensors than this model: {error}. Give the model it was prepared from."
        ) from error
    for hook in nncf_quantizers.hooks(module):
        nncf_quantizers.refresh_levels(nncf_quantizers.quantizer_at(module, hook.name))
    attach_wiring(module, from_json(json.loads(document["wiring"])))
    attach_ptq(module, ptq_from_json(document.get("ptq", "{}")))
    if "options" in document:
        attach_options(module, options_from_json(document["options"], where=f"{path}: its options"))
    return attach_bits(module.eval(), bits)
