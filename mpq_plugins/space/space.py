"""The decision space: which precisions each unit of layers may take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from mpq_plugins.common.files import check_keys, of_kinds, read_fields
from mpq_plugins.common.text import listed, pairs_of
from mpq_plugins.errors import FormatError, PluginError, SpaceError
from mpq_plugins.model.layers import Inventory, Layer, Skipped, matching, patterns_of, skipped_layers
from mpq_plugins.space.precision import Menu, Precision, Width, as_menu, menu

Refuse = Callable[[Layer, Precision], str | None]
Menus = Menu | Mapping[str, Menu]
Pins = Mapping[str, Width] | Iterable[str] | str
"""Pinned layers as users write them: see `pins_of`."""

Ties = Iterable[str | Iterable[str]]
"""Tied layers: groups of names or patterns, or one pattern for a group."""


@dataclass(frozen=True)
class Unit:
    """One decision: layers that take the same precision, and the precisions they may take.

    Units with the same `activation_group` must also agree on the activation bits: the framework quantizes the tensor
    that they read once.
    """

    layers: tuple[str, ...]
    choices: tuple[Precision, ...]
    activation_group: int

    @property
    def name(self) -> str:
        """The layer names joined by `+`."""
        return "+".join(self.layers)


@dataclass(frozen=True)
class AverageBits:
    """Weight bits per weight: over all searched layers, and over those with a decision to make (None without any).

    A size budget such as `w4` is about the free layers: with the first and last pinned at 8 bits all layers average more.
    """

    overall: float
    free: float | None

    def to_json(self) -> dict[str, float | None]:
        """Both averages as plain JSON values."""
        return {"all": self.overall, "free": self.free}

    def __str__(self) -> str:
        if self.free is None or abs(self.free - self.overall) < 5e-3:
            return f"{self.overall:.2f}"
        return f"{self.overall:.2f} over all searched layers, {self.free:.2f} over the free ones"


@dataclass(frozen=True)
class Space:
    """The units in order of their first layer, with the facts of all their layers. `build_space` and `Space.build` make it.

    `pins` records which layers were fixed and to what, `skipped` what stays in float and why; `fingerprint` is the model's.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
        >>> space = mpq.Space.build(mpq.find_layers(model, torch.zeros(1, 16)), (2, 4, 8), tie=[("0", "1")])
        >>> len(space.layers), len(space.units), space.n_stored_weights
        (2, 1, 160)
    """

    layers: tuple[Layer, ...]
    units: tuple[Unit, ...]
    fingerprint: str
    skipped: tuple[Skipped, ...] = ()
    pins: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        n_choices = sum(len(unit.choices) for unit in self.units)
        facts = f"Space: {len(self.layers)} layers, {len(self.units)} units, {n_choices} choices, {self.fingerprint[:19]}..."
        parts = {"units": [unit.name for unit in self.units], "pinned": self.pins, "skipped": [s.name for s in self.skipped]}
        return "\n  ".join([facts, *(f"{what}: {listed(names)}" for what, names in parts.items() if names)])

    def __hash__(self) -> int:
        return hash((self.layers, self.units, self.fingerprint))

    @classmethod
    def build(
        cls,
        inventory: Inventory,
        choices: Menus | None = None,
        *,
        pin: Pins | None = None,
        tie: Ties = (),
        share_activations: Ties = (),
        refuse: Refuse = lambda layer, precision: None,
    ) -> Space:
        """The space of `choices` over the layers of `inventory`.

        `choices` is one menu for all layers or glob -> menu, the last match counts (default: weights 2..8, activations 8);
        a menu holds `Precision`s, texts such as `"w4a8"` or weight bits.
        `pin` fixes layers: glob -> precision, or texts such as `"conv1=w8a8"`.
        `tie` lists groups of layers that take one precision: patterns each, or one pattern. Layers that hold the same weight
        are tied without asking. `share_activations` lists layers that must agree on activation bits only.
        `refuse` says why a target cannot do a precision; a layer refused at all of its choices is skipped.
        Raises `UnknownLayerError`, `PrecisionError` and `SpaceError`.
        """
        names = [layer.name for layer in inventory]
        if not names:
            raise SpaceError("no layer is left to decide on. Include more layers, or exclude fewer.")
        given = pins_of(pin).items()
        pins = {name: Precision.of(precision) for pattern, precision in given for name in matching(pattern, names)}
        menus, skipped = _menus(inventory, choices, pins, refuse)
        kept = [name for name in names if name in menus]
        if not kept:
            reasons = "; ".join(sorted({item.reason for item in skipped})[:3])
            raise SpaceError(f"every layer was refused, so there is nothing to decide. Reasons: {reasons}.")
        same_weight = [(layer.shares_weight_with, layer.name) for layer in inventory if layer.shares_weight_with]
        _check_ties(tie := _groups(tie), names)
        clusters = _components(kept, _known((*tie, *same_weight), names, kept))
        shared = _components(kept, [*clusters, *_known(_groups(share_activations), names, kept)])
        group_of = {name: index for index, members in enumerate(shared) for name in members}
        units = tuple(Unit(members, _common(members, menus), group_of[members[0]]) for members in clusters)
        return cls(
            layers=tuple(layer for layer in inventory if layer.name in menus),
            units=_agreeing(units),
            fingerprint=inventory.fingerprint,
            skipped=(*inventory.skipped, *skipped),
            pins={name: str(precision) for name, precision in pins.items()},
        )

    def layer(self, name: str) -> Layer:
        """The facts of one layer."""
        return self._layer_of[name]

    def weights(self, unit: Unit) -> dict[str, str]:
        """The distinct weights of a unit, each with one layer that holds it."""
        return {self.layer(name).weight_name: name for name in unit.layers}

    @cached_property
    def _layer_of(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def searches_activations(self) -> bool:
        """Whether some unit has choices of different activation bits."""
        return any(len({choice.activation for choice in unit.choices}) > 1 for unit in self.units)

    def is_free(self, unit: Unit) -> bool:
        """Whether the unit has a decision to make."""
        return len(unit.choices) > 1

    def average_bits(self, bits: Mapping[str, Precision]) -> AverageBits:
        """Weight bits per weight of an assignment (layer name -> precision)."""
        return self.average_bits_of_size(sum(layer.n_weights * bits[layer.name].weight for layer in self._stored) / 8)

    def average_bits_of_size(self, size_bytes: float) -> AverageBits:
        """Weight bits per weight that `size_bytes` hold: layers without a choice take their bits, the free ones the rest."""
        fixed = {name: unit.choices[0].weight for unit in self.units if not self.is_free(unit) for name in unit.layers}
        n_weights = self.n_stored_weights
        n_free = sum(layer.n_weights for layer in self._stored if layer.name not in fixed)
        fixed_bits = sum(layer.n_weights * fixed[layer.name] for layer in self._stored if layer.name in fixed)
        n_bits = 8 * size_bytes
        return AverageBits(n_bits / n_weights, (n_bits - fixed_bits) / n_free if n_free else None)

    @property
    def n_stored_weights(self) -> int:
        """Weights of all searched layers, one that several of them share counted once."""
        return sum(layer.n_weights for layer in self._stored)

    @cached_property
    def _stored(self) -> tuple[Layer, ...]:
        """The layers, less those that hold the weight of another."""
        return tuple(layer for layer in self.layers if layer.shares_weight_with not in self._layer_of)

    def assignment(self, choice: Sequence[int]) -> dict[str, Precision]:
        """Layer name -> precision, for one choice index per unit."""
        chosen = {name: unit.choices[index] for unit, index in zip(self.units, choice, strict=True) for name in unit.layers}
        return {layer.name: chosen[layer.name] for layer in self.layers}

    def tied(self) -> Space:
        """The same space with all free units tied into one: its solutions are the uniform allocations."""
        free = [unit for unit in self.units if self.is_free(unit)]
        if len(free) < 2:
            return self
        members = tuple(name for unit in free for name in unit.layers)
        common = tuple(choice for choice in free[0].choices if all(choice in unit.choices for unit in free))
        if not common:
            raise SpaceError("no precision is allowed in all free layers, so there is no uniform allocation to compare with.")
        groups = {unit.activation_group for unit in free}
        one = Unit(members, common, min(groups))
        rest = tuple(
            replace(unit, activation_group=one.activation_group if unit.activation_group in groups else unit.activation_group)
            for unit in self.units
            if not self.is_free(unit)
        )
        order = {layer.name: index for index, layer in enumerate(self.layers)}
        units = sorted((one, *rest), key=lambda unit: order[unit.layers[0]])
        return replace(self, units=_agreeing(tuple(units)))

    def to_json(self) -> dict[str, Any]:
        """The space as plain JSON values."""
        return {
            "layers": [layer.to_json() for layer in self.layers],
            "units": [
                {**vars(unit), "layers": list(unit.layers), "choices": list(map(str, unit.choices))} for unit in self.units
            ],
            "fingerprint": self.fingerprint,
            "skipped": [asdict(item) for item in self.skipped],
            "pins": dict(self.pins),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Space:
        """Inverse of `to_json`; raises `FormatError` for parts of another kind, and `SpaceError`."""
        kinds = {"layers": list, "units": list, "fingerprint": str, "skipped": list, "pins": dict}
        check_keys(document, allowed=set(kinds), required=set(kinds), where="the space")
        of_kinds(document, kinds, where="the space")
        space = cls(
            layers=tuple(Layer.from_json(item) for item in document["layers"]),
            units=tuple(_unit(item) for item in document["units"]),
            fingerprint=document["fingerprint"],
            skipped=tuple(read_fields(Skipped, item, where="a skipped entry") for item in document["skipped"]),
            pins={name: str(Precision.parse(bits)) for name, bits in document["pins"].items()},
        )
        if sorted(name for unit in space.units for name in unit.layers) != sorted(layer.name for layer in space.layers):
            raise SpaceError("the units of the space do not hold each of its layers once. Build the space again.")
        if not space.units or len({layer.name for layer in space.layers}) < len(space.layers):
            raise SpaceError("the space holds no layer, or one twice. Build the space again.")
        holders = {layer.name for layer in space.layers if layer.shares_weight_with is None}
        if not holders or any(layer.n_weights < 1 for layer in space.layers):
            raise SpaceError("no layer of the space holds a weight of its own, or one has no weights. Build the space again.")
        return space


def _unit(document: Any) -> Unit:
    """One unit from plain JSON values; raises `FormatError` and `PrecisionError`."""
    kinds = {"layers": list, "choices": list, "activation_group": int}
    check_keys(document, allowed=set(kinds), required=set(kinds), where="a unit")
    of_kinds(document, kinds, where="a unit")
    choices = tuple(Precision.parse(choice) for choice in document["choices"])
    if not document["layers"] or not all(isinstance(name, str) for name in document["layers"]):
        raise FormatError(f"a unit must list the names of its layers, not {document['layers']!r}. Build the space again.")
    if not choices or len(set(choices)) < len(choices):
        raise FormatError(
            f"the choices of {document['layers'][0]} must be different ones, at least one. Build the space again."
        )
    return Unit(tuple(document["layers"]), choices, document["activation_group"])


def first_and_last(inventory: Inventory, precision: Precision | str = "w8a8") -> dict[str, Precision | str]:
    """Pins at `precision` for the first and last layer of `inventory`: the usual protection of a classifier's stem and head.

    Example:
        >>> mpq.first_and_last(mpq.find_layers(torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.zeros(1, 16)))
        {'0': 'w8a8'}
    """
    return {layer.name: precision for layer in (*inventory.layers[:1], *inventory.layers[-1:])}


def residual_ties(inventory: Inventory) -> tuple[tuple[str, str], ...]:
    """Each down-sampling shortcut with the last main-branch layer of its block, as OMPQ and CSMPQ tie them.

    Layers of `inventory` are shortcuts in modules named downsample, down, shortcut, skip or proj_shortcut.

    Example:
        >>> from torchvision.models import resnet18
        >>> mpq.residual_ties(mpq.find_layers(resnet18(), torch.zeros(1, 3, 32, 32)))[0]
        ('layer2.0.conv2', 'layer2.0.downsample.0')
    """
    shortcut_names = {"downsample", "shortcut", "skip", "proj_shortcut", "down"}
    ties = []
    for layer in inventory:
        parts = layer.name.split(".")
        at = next((index for index, part in enumerate(parts) if part in shortcut_names), None)
        if at is None:
            continue
        block = ".".join(parts[:at])
        prefix = f"{block}." if block else ""
        main = [
            other.name
            for other in inventory
            if other.name.startswith(prefix) and other.name.removeprefix(prefix).split(".")[0] not in shortcut_names
        ]
        if main:
            ties.append((main[-1], layer.name))
    return tuple(ties)


def pins_of(pin: Pins | None) -> dict[str, Width]:
    """Glob -> precision, from a mapping, from texts such as `"conv1=w8a8"`, or from one; raises `SpaceError`."""
    if isinstance(pin, Mapping):
        return dict(pin)
    try:
        return {} if pin is None else {**pairs_of(pin)}
    except (PluginError, TypeError) as error:
        raise SpaceError(f"pin={pin!r} pins no layers. Write pin={{'conv1': 'w8a8'}}, or pin=['conv1=w8a8'].") from error


def _menus(
    inventory: Inventory, choices: Menus | None, pins: Mapping[str, Precision], refuse: Refuse
) -> tuple[dict[str, tuple[Precision, ...]], tuple[Skipped, ...]]:
    names = [layer.name for layer in inventory]
    wanted: dict[str, Sequence[Precision]] = {}
    asked_for = choices if isinstance(choices, Mapping) else {"*": menu() if choices is None else choices}
    for pattern, precisions in asked_for.items():
        wanted.update(dict.fromkeys(matching(pattern, names), as_menu(precisions)))
    menus: dict[str, tuple[Precision, ...]] = {}
    refused: dict[str, str] = {}
    for layer in inventory:
        asked = (pins[layer.name],) if layer.name in pins else tuple(dict.fromkeys(wanted.get(layer.name, ())))
        if not asked:
            raise SpaceError(f"{layer.name} has no choices: no menu matches it. Add a menu for '*'.")
        reasons = {precision: refuse(layer, precision) for precision in asked}
        allowed = tuple(precision for precision in asked if reasons[precision] is None)
        if allowed:
            menus[layer.name] = allowed
        elif layer.name in pins:
            raise SpaceError(
                f"{layer.name} is pinned to {asked[0]}, which the target refuses: {reasons[asked[0]]}. "
                "Pin another precision or exclude the layer."
            )
        else:
            refused[layer.name] = str(next(iter(reasons.values())))
    return menus, skipped_layers(inventory, refused)


def _groups(tie: Ties) -> tuple[tuple[str, ...], ...]:
    if isinstance(tie, str) or not isinstance(tie, Iterable):
        raise SpaceError(
            f"tie={tie!r} is one pattern, but ties are groups of layers. Write tie=[('conv1', 'conv2')], or tie=['layer1.*']."
        )
    return tuple(patterns_of(group) for group in tie)


def _check_ties(tie: Iterable[Sequence[str]], names: Sequence[str]) -> None:
    """Raise `SpaceError` for a tie of one layer, which would tie nothing."""
    for group in tie:
        found = {name for pattern in group for name in matching(pattern, names)}
        if len(found) < 2:
            raise SpaceError(
                f"the tie of {', '.join(map(repr, group))} holds {len(found)} layers ({', '.join(found)}), and a tie "
                "needs two. Write one group for each tie, such as tie=[('conv1', 'conv2')]."
            )


def _known(groups: Iterable[Sequence[str]], names: Sequence[str], kept: Sequence[str]) -> list[tuple[str, ...]]:
    resolved = [tuple(name for pattern in group for name in matching(pattern, names)) for group in groups]
    return [tuple(name for name in group if name in kept) for group in resolved]


def _components(names: Sequence[str], links: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Names joined by overlapping links, both in the order of `names`."""
    cluster = {name: {name} for name in names}
    for link in links:
        merged: set[str] = set().union(*(cluster[name] for name in link))
        for name in merged:
            cluster[name] = merged
    order = {name: index for index, name in enumerate(names)}
    unique = {id(members): members for members in cluster.values()}
    return sorted((tuple(sorted(members, key=order.__getitem__)) for members in unique.values()), key=lambda m: order[m[0]])


def _common(members: Sequence[str], menus: Mapping[str, tuple[Precision, ...]]) -> tuple[Precision, ...]:
    common = tuple(choice for choice in menus[members[0]] if all(choice in menus[name] for name in members))
    if not common:
        listed = "; ".join(f"{name}: {', '.join(map(str, menus[name]))}" for name in members)
        raise SpaceError(f"tied layers have no precision in common ({listed}). Widen a menu, or drop the pin or the tie.")
    return common


def _agreeing(units: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """Drop choices whose activation bits some other unit of the activation group cannot take."""
    allowed: dict[int, set[int]] = {}
    for unit in units:
        bits = {choice.activation for choice in unit.choices}
        allowed[unit.activation_group] = allowed.get(unit.activation_group, bits) & bits
    agreed = []
    for unit in units:
        choices = tuple(choice for choice in unit.choices if choice.activation in allowed[unit.activation_group])
        if not choices:
            members = [other.name for other in units if other.activation_group == unit.activation_group]
            raise SpaceError(
                f"{', '.join(members)} read one quantized activation and have no activation bits in common. "
                "Give them overlapping menus, or pin them alike."
            )
        agreed.append(replace(unit, choices=choices))
    return tuple(agreed)
