"""The bit configuration: the file that every adapter reads. Specified in docs/bit-config.md."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpq_plugins.common.files import check_keys, of_kinds, read_json, write_json
from mpq_plugins.common.html import html_table
from mpq_plugins.common.text import listed
from mpq_plugins.errors import FingerprintError, FormatError, PrecisionError
from mpq_plugins.model.layers import Inventory, unknown_layer
from mpq_plugins.space.precision import Precision

FORMAT = "mpq-bits/1"


class FrozenMapping(Mapping[str, Precision]):
    """A mapping that cannot be changed in place, can be copied and pickled, and equals any mapping of the same items."""

    def __init__(self, items: Mapping[str, Precision]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Precision:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __reversed__(self) -> Iterator[str]:
        return reversed(self._items)

    def items(self) -> ItemsView[str, Precision]:
        """The items in order; views of a dict can be reversed, and cannot change it."""
        return self._items.items()

    def __repr__(self) -> str:
        return repr(self._items)


@dataclass(frozen=True)
class BitConfig:
    """Layer name -> precision, for one model. Two configurations are equal when their layers are.

    Args:
        layers: layer name -> `Precision`, `"w4a8"`, or weight bits.
        fingerprint: the model's (`Inventory.fingerprint`).
        origin: how the bits were chosen.
        costs: cost name -> amount in the cost's unit.

    Example:
        >>> bits = mpq.BitConfig({"conv1": "w8a8", "conv2": 4}, "sha256:0")
        >>> bits["conv2"], bits.summary()
        (Precision(weight=4, activation=8), 'w8a8: conv1; w4a8: conv2')
    """

    layers: Mapping[str, Precision]
    fingerprint: str = field(compare=False)
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False)
    costs: Mapping[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise PrecisionError(f"the layers of a bit configuration map names to precisions, not {repr(self.layers)[:60]}.")
        layers = {name: Precision.of(precision) for name, precision in self.layers.items()}
        object.__setattr__(self, "layers", FrozenMapping(layers))

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.layers.items())))

    def __getitem__(self, layer: str) -> Precision:
        return self.layers[layer]

    def __repr__(self) -> str:
        costs = ", ".join(f"{name} {amount:,.0f}" for name, amount in self.costs.items())
        facts = f"BitConfig: {len(self.layers)} layers, {self.fingerprint[:19]}...\n  {self.summary()}"
        return facts + (f"\n  costs: {costs}" if costs else "")

    def _repr_html_(self) -> str:
        rows = [(name, precision.weight, precision.activation) for name, precision in self.layers.items()]
        return html_table(self.summary(), ("layer", "weight bits", "activation bits"), rows)

    def summary(self) -> str:
        """Which layers have which precision, in one line: `w8a8: conv1, fc; w4a8: conv2, conv3, conv4 and 9 more`."""
        names: dict[Precision, list[str]] = {}
        for name, precision in sorted(self.layers.items(), key=lambda item: item[1], reverse=True):
            names.setdefault(precision, []).append(name)
        told = [f"{precision}: {listed(members)}" for precision, members in names.items()]
        return "; ".join(told[:4]) + (f"; and {len(told) - 4} more precisions" if len(told) > 4 else "")

    def check(self, inventory: Inventory) -> None:
        """Make sure that the configuration fits the model.

        Raises `UnknownLayerError` for a layer the model lacks and `FingerprintError` for another model's configuration.
        """
        known = [layer.name for layer in inventory]
        for name in self.layers:
            if name not in known:
                raise unknown_layer(name, known)
        if not self.fingerprint:
            raise FingerprintError(
                f"the bit configuration does not say which model it is for: its fingerprint is empty, this model has "
                f"{inventory.fingerprint}. Put that into it if it is meant for this model."
            )
        if self.fingerprint != inventory.fingerprint:
            raise FingerprintError(
                f"the bit configuration is for a model with fingerprint {self.fingerprint[:19]}..., this model has "
                f"{inventory.fingerprint[:19]}...: its layer names match but some weight shapes or layers differ. "
                "Allocate again for this model."
            )

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values: the one form in which files of ours hold bits."""
        layers = {name: precision.to_json() for name, precision in self.layers.items()}
        return {"fingerprint": self.fingerprint, "layers": layers, "origin": dict(self.origin), "costs": dict(self.costs)}

    @classmethod
    def from_json(cls, document: Any, *, where: str) -> BitConfig:
        """Inverse of `to_json`; raises `FormatError` and `PrecisionError` naming what is wrong and where."""
        allowed = {"fingerprint", "layers", "origin", "costs"}
        check_keys(document, allowed=allowed, required={"fingerprint", "layers"}, where=where)
        of_kinds(document, {"fingerprint": str, "layers": dict, "origin": dict, "costs": dict}, where=where)
        if not document["layers"]:
            raise FormatError(f'{where}: "layers" must map layer names to bits and hold at least one layer.')
        layers = {
            name: Precision.from_json(bits, where=f"{where}: layer {name!r}") for name, bits in document["layers"].items()
        }
        return cls(**{**document, "layers": layers})

    def save(self, path: str | Path) -> Path:
        """Write the configuration as JSON, atomically; equal configurations give equal bytes."""
        return write_json(path, {"format": FORMAT, **self.to_json()})

    @classmethod
    def load(cls, path: str | Path) -> BitConfig:
        """Read a configuration; raises `FormatError` and `PrecisionError` naming what is wrong and where."""
        document = read_json(path, format=FORMAT)
        return cls.from_json({key: value for key, value in document.items() if key != "format"}, where=str(path))
