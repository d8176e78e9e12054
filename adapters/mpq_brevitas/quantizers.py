"""Which Brevitas quantizers a recipe stands for."""

from __future__ import annotations

from typing import Any

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.duq import duq_activation_quantizer, duq_weight_quantizer
from mpq_brevitas.recipe import Recipe


def weight_quantizer(bits: int, recipe: Recipe) -> Any:
    """The quantizer class of a weight of so many bits."""
    if recipe.quantizer == "duq":
        return duq_weight_quantizer(bits)
    return brevitas.weight_quantizer(
        bits,
        recipe.weight_range,
        power_of_two=recipe.scales == "power-of-two",
        learned=recipe.weight_scale == "learned",
    )


def activation_quantizer(bits: int, recipe: Recipe, *, signed: bool) -> Any:
    """The quantizer class of an activation of so many bits."""
    if recipe.quantizer == "duq":
        return duq_activation_quantizer(bits, signed=signed)
    return brevitas.activation_quantizer(bits, signed=signed, power_of_two=recipe.scales == "power-of-two")
