"""Quantized modules at rest: tensors and JSON text, no pickled classes."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from mpq_nncf import nncf_quantizers, nncf_setup
from mpq_nncf.internals import quiet
from mpq_nncf.options import NNCFOptions
from mpq_nncf.wiring import LayerWiring, wiring_of
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.checkpoint import check_same_model, read_checkpoint, write_checkpoint
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.record import record, recorded_fact
from mpq_plugins.common.files import parse_json, read_fields
from mpq_plugins.errors import FormatError
from mpq_plugins.model.discover import find_layers

_ADAPTER = "nncf"


def save(module: nn.Module, path: str | Path) -> Path:
    """See `AbstractAdapter.save`."""
    with quiet():
        placement = nncf_quantizers.placement(module)
    options: NNCFOptions | None = recorded_fact(module, "options")
    contents = {
        "placement": json.dumps(placement),
        "wiring": json.dumps({name: asdict(layer) for name, layer in wiring_of(module).items()}),
        "ptq": json.dumps(asdict(recorded_fact(module, "ptq") or PTQ())),
        "options": json.dumps({} if options is None else asdict(options), sort_keys=True),
        "state": dict(module.state_dict()),
    }
    return write_checkpoint(path, module, contents, adapter=_ADAPTER)


def prepared_with(module: nn.Module) -> dict[str, bool]:
    """See `AbstractAdapter.prepared_with`."""
    options: NNCFOptions | None = recorded_fact(module, "options")
    return {"asymmetric": _has_zero_points(module)} if options is None else asdict(options)


def _has_zero_points(module: nn.Module) -> bool:
    places = {place for layer in wiring_of(module).values() for place in layer.activation}
    quantizers = [nncf_quantizers.quantizer_at(module, place) for place in places]
    return any(nncf_quantizers.activation_kind(quantizer).asymmetric for quantizer in quantizers)


def load(model: nn.Module, path: str | Path, example: Any) -> nn.Module:
    """See `AbstractAdapter.load`; also raises `FingerprintError` for another model's checkpoint."""
    keys = {"placement", "wiring", "state"}
    bits, document = read_checkpoint(path, keys, adapter=_ADAPTER, optional={"ptq", "options"})  # older ones lack them
    check_same_model(path, bits, find_layers(model, example))
    with quiet():
        module = nncf_quantizers.place(nncf_setup.as_hookable(copy.deepcopy(model)), json.loads(document["placement"]))
    try:
        module.load_state_dict(document["state"])
    except RuntimeError as error:
        raise FormatError(
            f"{path} holds other tensors than this model: {error}. Give the model it was prepared from."
        ) from error
    for hook in nncf_quantizers.hooks(module):
        nncf_quantizers.refresh_levels(nncf_quantizers.quantizer_at(module, hook.name))
    wiring = parse_json(document["wiring"], where=f"{path}: its wiring")
    places = {name: read_fields(LayerWiring, item, where=f"{path}: {name}") for name, item in wiring.items()}
    record(module, wiring=places, ptq=PTQ.of(json.loads(document.get("ptq", "{}"))))
    options = parse_json(document.get("options", "{}"), where=f"{path}: its options")
    if options:
        record(module, options=read_fields(NNCFOptions, options, where=f"{path}: its options"))
    return attach_bits(module.eval(), bits)
