"""What checkpoints of all adapters share: tensors and JSON text in torch's format, nothing that unpickles code."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_plugins.adapter.base import bits_of
from mpq_plugins.adapter.record import recorded_fact
from mpq_plugins.common.files import check_keys, parse_json
from mpq_plugins.common.tensor_files import read_torch, write_torch
from mpq_plugins.errors import FingerprintError, FormatError, MPQError
from mpq_plugins.model.layers import Inventory
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision

if TYPE_CHECKING:
    from torch import nn

FORMAT = "mpq-module/1"


def write_checkpoint(path: str | Path, module: nn.Module, contents: dict[str, Any], *, adapter: str) -> Path:
    """Write `contents`, the bits and the origin of a module prepared by `adapter`."""
    bits = bits_of(module)
    layers = {name: [precision.weight, precision.activation] for name, precision in bits.layers.items()}
    saved = {"layers": layers, "fingerprint": bits.fingerprint, "origin": dict(bits.origin), "costs": dict(bits.costs)}
    document = {"format": FORMAT, "adapter": adapter, "bits": json.dumps(saved), **contents}
    origin = recorded_fact(module, "origin")
    if origin is not None:
        document.update(origin=json.dumps(origin.facts), example=origin.example)
    return write_torch(path, document)


def read_checkpoint(
    path: str | Path, keys: set[str], *, adapter: str, optional: AbstractSet[str] = frozenset()
) -> tuple[BitConfig, dict[str, Any]]:
    """The bits and the contents under `keys` of a checkpoint of `adapter`, and those `optional` ones that it has.

    Raises `FormatError`.
    """
    document = read_torch(path, "checkpoint", "Give the file that save() or `mpq apply` wrote")
    found = (document.get("format"), document.get("adapter")) if isinstance(document, dict) else (None, None)
    if found != (FORMAT, adapter):
        raise FormatError(
            f"{path} has format {found[0]!r} of adapter {found[1]!r}, expected {FORMAT!r} of {adapter!r}. "
            "Load it with the adapter that saved it."
        )
    every = {"format", "adapter", "bits", *keys}
    check_keys(document, allowed=every | optional, required=every, where=str(path))
    return _bits(document["bits"], where=f"{path}: its bits"), {
        key: document[key] for key in (*keys, *optional) if key in document
    }


def _bits(text: Any, *, where: str) -> BitConfig:
    """Inverse of what `write_checkpoint` makes of a bit configuration."""
    saved = parse_json(text if isinstance(text, str) else "", where=where)
    keys = {"layers", "fingerprint", "origin", "costs"}
    check_keys(saved, allowed=keys, required=keys, where=where)
    try:
        layers = {name: Precision(*precision) for name, precision in saved.pop("layers").items()}
    except (AttributeError, TypeError, MPQError) as error:
        raise FormatError(f"{where} are no pairs of bit-widths: {error}. Write the file again.") from error
    return BitConfig(layers, **saved)


def check_same_model(path: str | Path, bits: BitConfig, inventory: Inventory) -> None:
    """Refuse the checkpoint of another model; raises `FingerprintError`."""
    if bits.fingerprint != inventory.fingerprint:
        raise FingerprintError(
            f"{path} was prepared from another model: its layers have fingerprint {bits.fingerprint[:19]}..., this model's "
            f"{inventory.fingerprint[:19]}.... Give the model it was prepared from."
        )
