"""Quantized modules at rest: tensors and JSON text, no pickled classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq_nncf import _nncf_internals as internals
from mpq_nncf._hookable import as_hookable
from mpq_nncf._quiet import quiet
from mpq_nncf._wiring import attach_wiring, from_json, to_json, wiring_of
from mpq_plugins._adapter import attach_bits, bits_of
from mpq_plugins._bits import BitConfig
from mpq_plugins._discover import find_layers
from mpq_plugins._errors import FingerprintError, FormatError
from mpq_plugins._files import check_keys, write_whole
from mpq_plugins._precision import Precision

FORMAT, _ADAPTER = "mpq-module/1", "nncf"


def save(module: nn.Module, path: str | Path) -> Path:
    """See `AbstractAdapter.save`."""
    with quiet():
        placement = internals.placement(module)
    document = {
        "format": FORMAT,
        "adapter": _ADAPTER,
        "placement": json.dumps(placement),
        "wiring": json.dumps(to_json(wiring_of(module))),
        "bits": json.dumps(_bits_to_json(bits_of(module))),
        "state": dict(module.state_dict()),
    }
    return write_whole(path, lambda temporary: torch.save(document, temporary))


def load(model: nn.Module, path: str | Path, example: Any) -> nn.Module:
    """See `AbstractAdapter.load`; also raises `FingerprintError` for another model's checkpoint."""
    document = _read(Path(path))
    bits = _bits_from_json(json.loads(document["bits"]))
    inventory = find_layers(model, example)
    if bits.fingerprint != inventory.fingerprint:
        raise FingerprintError(
            f"{path} was prepared from another model: its layers have fingerprint {bits.fingerprint[:19]}..., this model's "
            f"{inventory.fingerprint[:19]}.... Give the model it was prepared from."
        )
    with quiet():
        module = internals.place(as_hookable(copy.deepcopy(model)), json.loads(document["placement"]))
    try:
        module.load_state_dict(document["state"])
    except RuntimeError as error:
        raise FormatError(
            f"{path} holds other tensors than this model: {error}. Give the model it was prepared from."
        ) from error
    for hook in internals.hooks(module):
        internals.refresh_levels(internals.quantizer_at(module, hook.name))
    attach_wiring(module, from_json(json.loads(document["wiring"])))
    return attach_bits(module.eval(), bits)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise FormatError(f"{path} does not exist. Give the file that save() returned.")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of many kinds for damaged archives
        # torch's own text advises weights_only=False, which would run whatever code the file holds.
        raise FormatError(
            f"{path} is no checkpoint, or a damaged one ({type(error).__name__}). "
            "Give the file that save() or `mpq apply` wrote."
        ) from error
    found = (document.get("format"), document.get("adapter")) if isinstance(document, dict) else (None, None)
    if found != (FORMAT, _ADAPTER):
        raise FormatError(
            f"{path} has format {found[0]!r} of adapter {found[1]!r}, expected {FORMAT!r} of {_ADAPTER!r}. "
            "Load it with the adapter that saved it."
        )
    keys = {"format", "adapter", "placement", "wiring", "bits", "state"}
    check_keys(document, allowed=keys, required=keys, where=str(path))
    result: Mapping[str, Any] = document
    return result


def _bits_to_json(bits: BitConfig) -> dict[str, Any]:
    layers = {name: [precision.weight, precision.activation] for name, precision in bits.layers.items()}
    return {"layers": layers, "fingerprint": bits.fingerprint, "origin": dict(bits.origin), "costs": dict(bits.costs)}


def _bits_from_json(document: Mapping[str, Any]) -> BitConfig:
    layers = {name: Precision(weight, activation) for name, (weight, activation) in document["layers"].items()}
    return BitConfig(layers, document["fingerprint"], document["origin"], document["costs"])
