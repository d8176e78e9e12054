"""What an exported file says about itself, and how that is weighed against what it holds."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_plugins.common.files import check_keys, parse_json
from mpq_plugins.errors import FormatError
from mpq_plugins.model.layers import fingerprint
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import ACTIVATION_BITS, Precision

FORMAT = "mpq-artifact/1"
KEY = "mpq"  # of the declaration in a file's metadata
# What follows a layer's name in the names of its parts in a file.
WEIGHT, ACTIVATION, CALL = "/weight", "/activation", "/call_"


@dataclass(frozen=True)
class Declared:
    """One layer: its bits, the shape of its float weight, and the layer under whose name its codes are stored."""

    precision: Precision
    shape: tuple[int, ...]
    stored_as: str


@dataclass(frozen=True)
class Declaration:
    """The bits that an exported file was made with."""

    fingerprint: str
    layers: Mapping[str, Declared]

    def dumps(self) -> str:
        """One line of JSON."""
        layers = {
            name: {
                **layer.precision.to_json(),
                "shape": list(layer.shape),
                "stored_as": layer.stored_as,
            }
            for name, layer in self.layers.items()
        }
        return json.dumps({"format": FORMAT, "fingerprint": self.fingerprint, "layers": layers})

    @classmethod
    def loads(cls, text: str, *, where: str) -> Declaration:
        """Inverse of `dumps`; raises `FormatError`."""
        document = parse_json(text, where=f"{where}: its record of bits")
        found = document.get("format") if isinstance(document, dict) else None
        if found != FORMAT:
            raise FormatError(
                f"{where}: its record of bits has format {found!r}, expected {FORMAT!r}. "
                "Read it with the adapter that exported it."
            )
        keys = {"format", "fingerprint", "layers"}
        check_keys(document, allowed=keys, required=keys, where=f"{where}: its record of bits")
        keys = {"weight", "activation", "shape", "stored_as"}
        layers = {}
        for name, item in document["layers"].items():
            check_keys(item, allowed=keys, required=keys, where=f"{where}: layer {name!r} in its record of bits")
            layers[name] = Declared(Precision(item["weight"], item["activation"]), tuple(item["shape"]), item["stored_as"])
        return cls(document["fingerprint"], layers)


Levels = tuple[int | None, ...]


@dataclass(frozen=True)
class Found:
    """What a file holds for one stored weight: its codes, the width of their storage, and the levels of what feeds it.

    `levels` maps each layer that uses the weight to one entry per quantizer that feeds it, None for a float input.
    """

    codes: np.ndarray
    storage_bits: int
    levels: Mapping[str, Levels]


def declare(bits: BitConfig, shapes: Mapping[str, Sequence[int]], holders: Mapping[str, str]) -> Declaration:
    """The declaration of a module's bits; `holders` names the layer that stores each layer's codes."""
    layers = {name: Declared(p, tuple(shapes[name]), holders[name]) for name, p in bits.layers.items()}
    return Declaration(bits.fingerprint, layers)


def weighed_bits(declaration: Declaration | None, found: Mapping[str, Found]) -> BitConfig:
    """The bits that a file really holds.

    A declared width counts when the codes and levels bear it out; otherwise the measured width is returned. A layer whose
    weight or input is not quantized is left out.
    """
    declared = {} if declaration is None else declaration.layers
    stored = {name: layer.stored_as for name, layer in declared.items()}
    stored.update({user: name for name, item in found.items() for user in item.levels if user not in declared})
    layers = {}
    for name, holder in stored.items():
        claim = declared[name].precision if name in declared else None
        item = found.get(holder)
        weight = None if item is None else _weight_bits(item, None if claim is None else claim.weight)
        activation = None if item is None else _activation_bits(item.levels.get(name, ()), claim and claim.activation)
        if weight is not None and activation is not None:
            layers[name] = Precision(weight, activation)
    shapes = {name: item.codes.shape for name, item in found.items()}
    return BitConfig(layers, fingerprint(shapes) if declaration is None else declaration.fingerprint)


def measured_width(codes: np.ndarray) -> int:
    """The least width from 2 bits on that holds all codes."""
    least, most = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    return max(2, (max(-least - 1, most)).bit_length() + 1)


def _weight_bits(found: Found, claim: int | None) -> int | None:
    width = measured_width(found.codes)
    if claim is not None and width <= claim <= found.storage_bits:
        return claim
    return width if width <= 8 else None


def _activation_bits(levels: Levels, claim: int | None) -> int | None:
    if not levels or None in levels:
        return None
    if claim is not None and all(level == 2**claim for level in levels):
        return claim
    differing = [level for level in levels if level is not None and (claim is None or level != 2**claim)]
    width = (differing[0] - 1).bit_length()
    if width == claim:  # fewer levels than the width has: the widest that is complete
        width -= 1
    return width if width in ACTIVATION_BITS else None


def shaped(declaration: Declaration | None, found: Mapping[str, Found]) -> dict[str, np.ndarray]:
    """Layer name -> codes in the shape of the float weight."""
    if declaration is None:
        return {name: item.codes for name, item in found.items()}
    result = {}
    for name, layer in declaration.layers.items():
        item = found.get(layer.stored_as)
        if item is not None:
            whole = item.codes.size == int(np.prod(layer.shape))
            result[name] = item.codes.reshape(layer.shape) if whole else item.codes
    return result


def declared_in(text: Any, path: Path) -> Declaration | None:
    """The declaration of a file from the text in its metadata, or None when it has none; raises `FormatError`."""
    is_one = isinstance(text, str) and text.startswith("{")
    return Declaration.loads(text, where=str(path)) if is_one else None


def levels_by_user(holder: str, calls: Iterable[tuple[str, Levels]]) -> dict[str, Levels]:
    """What feeds each layer that uses the weight of `holder`, from the names of its operations and what feeds those."""
    levels: dict[str, Levels] = {}
    for name, fed in calls:
        user, marked, _ = name.rpartition(CALL)
        user = user if marked else holder
        levels[user] = (*levels.get(user, ()), *fed)
    return levels
