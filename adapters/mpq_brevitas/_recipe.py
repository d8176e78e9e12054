"""How a module was quantized: what a checkpoint must remember besides tensors and bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from mpq_plugins._errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

Profile = Literal["layerwise", "finn"]
WeightRange = Literal["mse", "max"]


@dataclass(frozen=True)
class Recipe:
    """The options that rebuild a quantized module's structure.

    `signed` tells, per layer, whether the quantizer of its input is signed; `profile` "finn" has no use for it, because
    there the operation in front of the quantizer decides.
    """

    profile: Profile
    weight_range: WeightRange
    signed: Mapping[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("profile", self.profile, get_args(Profile)),
            ("weight_range", self.weight_range, get_args(WeightRange)),
        ):
            if value not in allowed:
                raise AdapterError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return {"profile": self.profile, "weight_range": self.weight_range, "signed": dict(self.signed)}


def attach_recipe(module: nn.Module, recipe: Recipe) -> nn.Module:
    """Let a quantized module remember its recipe; deepcopy keeps it."""
    object.__setattr__(module, "_mpq_brevitas_recipe", recipe)
    return module


def recipe_of(module: nn.Module) -> Recipe:
    """The recipe of a quantized module; raises `AdapterError` for a module of another origin."""
    recipe = getattr(module, "_mpq_brevitas_recipe", None)
    if not isinstance(recipe, Recipe):
        raise AdapterError(
            f"{type(module).__name__} was not made by BrevitasAdapter's prepare() or load(). Call one of them first."
        )
    return recipe
