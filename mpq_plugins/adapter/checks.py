"""Checks that every adapter makes before it quantizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from mpq_plugins.errors import AdapterError
from mpq_plugins.model.layers import Layer
from mpq_plugins.space.precision import Precision

TIE = "Tie them: tie=[(first, second)]."  # what to do about layers that hold one weight
_SHARED = {"weight": "hold the same weight", "activation": "read one activation quantizer"}


def check_agreement(
    groups: Iterable[Sequence[str]], bits: Mapping[str, Precision], part: Literal["weight", "activation"], advice: str
) -> None:
    """Raise `AdapterError` with `advice` where layers of a group, which share one quantizer, ask for different bits of it."""
    for group in groups:
        asked = {name: getattr(bits[name], part) for name in group if name in bits}
        if len(set(asked.values())) > 1:
            told = ", ".join(f"{name}: {width}" for name, width in asked.items())
            raise AdapterError(f"{', '.join(asked)} {_SHARED[part]} but ask for different {part} bits ({told}). {advice}")


def check_tied_weights(layers: Iterable[Layer], bits: Mapping[str, Precision]) -> None:
    """Raise `AdapterError` where layers that hold the same weight ask for different weight bits."""
    holders = [(layer.shares_weight_with, layer.name) for layer in layers if layer.shares_weight_with is not None]
    check_agreement(holders, bits, "weight", TIE)
