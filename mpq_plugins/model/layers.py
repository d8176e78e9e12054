"""What is there to quantize: the weighted layers of a model, as facts without torch objects."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mpq_plugins.common.files import read_fields
from mpq_plugins.common.html import html_table
from mpq_plugins.common.text import listed
from mpq_plugins.common.values import Count
from mpq_plugins.errors import SpaceError, UnknownLayerError


@dataclass(frozen=True)
class Layer:
    """Facts about one weighted layer, from one forward pass. Shapes and counts are per image (batch item).

    `name` is the module's first name in `named_modules()`; for a functional call on a parameter that belongs to no
    layer module it is the parameter's own name. `macs` counts multiply-accumulates of all `n_calls` calls.
    `n_norm_parameters` counts the affine parameters of the batch normalisation that reads the layer's output.
    `shares_weight_with` names the earlier layer that holds the same weight, which is then stored once.
    """

    name: str
    kind: str
    weight_name: str
    weight_shape: tuple[Count, ...]
    n_weights: Count
    n_biases: Count
    n_norm_parameters: Count
    out_channels: Count
    groups: Count
    macs: Count
    n_calls: Count
    input_shape: tuple[Count, ...]
    output_shape: tuple[Count, ...]
    n_input_elements: Count
    n_output_elements: Count
    functional: bool = False
    aliases: tuple[str, ...] = ()
    shares_weight_with: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The facts as plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Layer:
        """Inverse of `to_json`; raises `FormatError` for facts of another kind."""
        return read_fields(cls, document, where="a layer")


EXCLUDED = "excluded by the user; stays in float"


@dataclass(frozen=True)
class Skipped:
    """Something that holds weights or could be quantized, and is not; with the reason.

    `n_weights` counts its weights of two or more dimensions that no layer and no other skipped entry holds. `macs` counts
    its multiply-accumulates per image, as far as they are known.
    """

    name: str
    reason: str
    n_weights: Count = 0
    macs: Count = 0


@dataclass(frozen=True)
class Inventory:
    """The layers of a model in order of their first call, and what was skipped.

    Every parameter of two or more dimensions belongs to a layer or counts in one skipped entry.
    `fingerprint` is a digest of all layer names and weight shapes of the model, excluded ones too: two models with
    equal fingerprints accept the same bit configuration.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    fingerprint: str

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        n_weights, macs = distinct_weights(self.layers), sum(layer.macs for layer in self.layers)
        facts = f"{len(self.layers)} layers, {n_weights:,} weights, {macs:,} MACs, {self.fingerprint[:19]}..."
        return f"Inventory: {facts}\n  layers: {listed(layer.name for layer in self.layers)}" + (
            f"\n  skipped: {listed(item.name for item in self.skipped)}" if self.skipped else ""
        )

    def _repr_html_(self) -> str:
        rows = [
            (layer.name, layer.kind, "x".join(map(str, layer.weight_shape)), f"{layer.n_weights:,}", f"{layer.macs:,}")
            for layer in self.layers
        ]
        skipped = [f"skipped {item.name}: {item.reason}" for item in self.skipped]
        return html_table(f"{len(rows)} layers", ("layer", "kind", "weight", "weights", "MACs"), rows, skipped)

    def __getitem__(self, name: str) -> Layer:
        for layer in self.layers:
            if name == layer.name or name in layer.aliases:
                return layer
        raise unknown_layer(name, [layer.name for layer in self.layers])


def distinct_weights(layers: Iterable[Layer]) -> int:
    """Weights of `layers`, one that several of them share counted once."""
    return sum({layer.weight_name: layer.n_weights for layer in layers}.values())


def skipped_layers(layers: Iterable[Layer], reasons: Mapping[str, str]) -> tuple[Skipped, ...]:
    """Entries for the layers that `reasons` (layer name -> reason) names; weights that a layer left over shares count there."""
    layers = tuple(layers)
    counted = {layer.weight_name for layer in layers if layer.name not in reasons}
    entries = []
    for layer in layers:
        if layer.name in reasons:
            n_weights = 0 if layer.weight_name in counted else layer.n_weights
            counted.add(layer.weight_name)
            entries.append(Skipped(layer.name, reasons[layer.name], n_weights, layer.macs))
    return tuple(entries)


def fingerprint(shapes: Mapping[str, Sequence[int]]) -> str:
    """`sha256:` digest of layer names and weight shapes, independent of their order."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def unknown_layer(name: str, known: Sequence[str]) -> UnknownLayerError:
    """The error for a name or pattern that matches no layer, with the closest names there are."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or list(known[:3])
    return UnknownLayerError(
        f"no layer is named or matched by {name!r}. The closest of the {len(known)} layers: "
        f"{', '.join(close) or 'none'}. `mpq layers` lists them all."
    )


def patterns_of(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """Patterns as a tuple; one string is one pattern, not its characters. Raises `SpaceError` for anything but texts."""
    found = (patterns,) if isinstance(patterns, str) or not isinstance(patterns, Iterable) else tuple(patterns)
    wrong = [pattern for pattern in found if not isinstance(pattern, str)]
    if wrong:
        raise SpaceError(f"{wrong[0]!r} is no name or pattern of layers. Give texts, such as ('conv1', 'layer4.*').")
    return found


def matching(pattern: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names equal to `pattern` or matched by it as a glob; raises `UnknownLayerError` when there are none."""
    found = tuple(name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern))
    if not found:
        raise unknown_layer(pattern, names)
    return found
