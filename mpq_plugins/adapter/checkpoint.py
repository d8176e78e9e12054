"""What checkpoints of all adapters share: tensors and JSON text in torch's format, nothing that unpickles code."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_plugins.adapter.base import bits_of
from mpq_plugins.adapter.record import Origin, recorded_fact
from mpq_plugins.common.files import check_keys, of_kinds, parse_json
from mpq_plugins.common.tensor_files import read_torch, write_torch
from mpq_plugins.errors import FingerprintError, FormatError, PrecisionError
from mpq_plugins.model.layers import Inventory
from mpq_plugins.space.bits import BitConfig

if TYPE_CHECKING:
    from torch import nn

FORMAT = "mpq-module/1"
_MIB = 2**20


def write_checkpoint(path: str | Path, module: nn.Module, contents: dict[str, Any], *, adapter: str) -> Path:
    """Write `contents`, the bits and the origin of a module prepared by `adapter`."""
    bits = bits_of(module)
    document = {"format": FORMAT, "adapter": adapter, "bits": json.dumps(bits.to_json()), **contents}
    origin = recorded_fact(module, "origin")
    if isinstance(origin, Origin):
        document.update(origin=json.dumps(origin.facts), example=small(origin.example))
    return write_torch(path, document)


def read_checkpoint(
    path: str | Path, keys: set[str], *, adapter: str, optional: AbstractSet[str] = frozenset()
) -> tuple[BitConfig, dict[str, Any]]:
    """The bits and the contents under `keys` of a checkpoint of `adapter`, and those `optional` ones that it has.

    Raises `FormatError`.
    """
    document = _read(path)
    found = (document.get("format"), document.get("adapter"))
    if found != (FORMAT, adapter):
        raise FormatError(
            f"{path} has format {found[0]!r} of adapter {found[1]!r}, expected {FORMAT!r} of {adapter!r}. "
            "Load it with the adapter that saved it."
        )
    every = {"format", "adapter", "bits", *keys}
    check_keys(document, allowed=every | optional | {"origin", "example"}, required=every, where=str(path))
    return _bits(document["bits"], where=f"{path}: its bits"), {
        key: document[key] for key in (*keys, *optional) if key in document
    }


def read_origin(path: str | Path) -> tuple[str, Origin | None]:
    """The adapter that wrote a checkpoint, and how its module came about where the file says so; raises `FormatError`."""
    document = _read(path)
    if document.get("format") != FORMAT or not isinstance(document.get("adapter"), str):
        raise FormatError(f"{path} has format {document.get('format')!r}, expected {FORMAT!r}. Give a file of save().")
    if "origin" not in document:
        return document["adapter"], None
    where, text = f"{path}: its origin", document["origin"]
    facts = parse_json(text if isinstance(text, str) else "", where=where)
    check_keys(facts, allowed={"options", "command"}, required={"options", "command"}, where=where)
    of_kinds(facts, {"options": dict, "command": dict}, where=where)
    return document["adapter"], Origin(facts, document.get("example"))


def _read(path: str | Path) -> dict[str, Any]:
    document = read_torch(path, "checkpoint", "Give the file that save() or `mpq apply` wrote")
    return document if isinstance(document, dict) else {}


def small(example: Any) -> Any:
    """An example to be kept in a file: its first row where all of it takes more than a megabyte."""
    from mpq_plugins.model.run import Batch, tensors

    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors(example))
    return Batch(example).part(0, 1).inputs if n_bytes > _MIB else example


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
