"""How a module was quantized: what a checkpoint must remember besides tensors and bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mpq_plugins.adapter.ptq import ActivationRange, WeightRange
from mpq_plugins.adapter.record import record, recorded_fact
from mpq_plugins.common.values import check_values
from mpq_plugins.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

Profile = Literal["layerwise", "finn"]
QuantizerKind = Literal["uniform", "duq"]
Scales = Literal["float", "power-of-two"]
WeightScale = Literal["learned", "statistics"]


@dataclass(frozen=True)
class Recipe:
    """The options that rebuild a quantized module's structure, and fit its ranges again.

    `signed` tells, per layer, whether the quantizer of its input is signed; `profile` "finn" has no use for it, because
    there the operation in front of the quantizer decides. `weight_scale` "statistics" computes scales of
    `weight_range="max"` from the weights at every step, as checkpoints of the first release do.
    """

    profile: Profile
    weight_range: WeightRange
    signed: Mapping[str, bool] = field(default_factory=dict)
    activation_range: ActivationRange = "default"
    quantizer: QuantizerKind = "uniform"
    scales: Scales = "float"
    weight_scale: WeightScale = "learned"

    def __post_init__(self) -> None:
        check_values(Recipe, vars(self), AdapterError)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Recipe:
        """From what `to_json` wrote, in this release or in the first."""
        return cls(**{"weight_scale": "statistics" if document["weight_range"] == "max" else "learned", **document})

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return {**vars(self), "signed": dict(self.signed)}


def attach_recipe(module: nn.Module, recipe: Recipe) -> nn.Module:
    """Let a quantized module remember its recipe; deepcopy keeps it."""
    return record(module, recipe=recipe)


def recipe_of(module: nn.Module) -> Recipe:
    """The recipe of a quantized module; raises `AdapterError` for a module of another origin."""
    recipe = recorded_fact(module, "recipe")
    if not isinstance(recipe, Recipe):
        raise AdapterError(
            f"{type(module).__name__} was not made by BrevitasAdapter's prepare() or load(). Call one of them first."
        )
    return recipe
