"""What checkpoints of all adapters share: tensors and JSON text in torch's format, nothing that unpickles code."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from mpq_plugins.common.files import check_keys, parse_json
from mpq_plugins.common.tensor_files import read_torch, write_torch
from mpq_plugins.errors import FingerprintError, FormatError, PrecisionError
from mpq_plugins.model.layers import Inventory
from mpq_plugins.space.bits import BitConfig

FORMAT = "mpq-module/1"


def write_checkpoint(path: str | Path, bits: BitConfig, contents: dict[str, Any], *, adapter: str) -> Path:
    """Write `contents` and the bits of a module prepared by `adapter`."""
    document = {"format": FORMAT, "adapter": adapter, "bits": json.dumps(bits.to_json()), **contents}
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
    """The bits in the text of a checkpoint; raises `FormatError`."""
    try:
        return BitConfig.from_json(parse_json(text if isinstance(text, str) else "", where=where), where=where)
    except PrecisionError as error:
        raise FormatError(f"{error} The file was edited by hand; write it again.") from error


def check_same_model(path: str | Path, bits: BitConfig, inventory: Inventory) -> None:
    """Refuse the checkpoint of another model; raises `FingerprintError`."""
    if bits.fingerprint != inventory.fingerprint:
        raise FingerprintError(
            f"{path} was prepared from another model: its layers have fingerprint {bits.fingerprint[:19]}..., this model's "
            f"{inventory.fingerprint[:19]}.... Give the model it was prepared from."
        )
