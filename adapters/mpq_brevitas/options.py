"""How a module is quantized: what a checkpoint must remember besides tensors and bits, and what cannot be combined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mpq_plugins.adapter.ptq import PTQ, ActivationRange, WeightRange
from mpq_plugins.adapter.record import recorded_fact
from mpq_plugins.common.values import check_values
from mpq_plugins.errors import AdapterError

if TYPE_CHECKING:
    from torch import nn

Profile = Literal["layerwise", "finn"]
QuantizerKind = Literal["uniform", "duq"]
Scales = Literal["float", "power-of-two"]
WeightScale = Literal["learned", "statistics"]
Flattened = Literal["passed", "requantized"]


@dataclass(frozen=True)
class BrevitasOptions:
    """The options that rebuild a quantized module's structure, and fit its ranges again.

    `signed` tells, per layer, whether the quantizer of its input is signed; `profile` "finn" has no use for it, because
    there the operation in front of the quantizer decides. `weight_scale` "statistics" computes scales of
    `weight_range="max"` from the weights at every step, as checkpoints of the first release do. `flattened` "requantized" has
    a second quantizer behind every `nn.Flatten` of the profile "finn", as checkpoints that do not name it.
    """

    profile: Profile = "layerwise"
    weight_range: WeightRange = "mse"
    signed: Mapping[str, bool] = field(default_factory=dict)
    activation_range: ActivationRange = "default"
    quantizer: QuantizerKind = "uniform"
    scales: Scales = "float"
    weight_scale: WeightScale = "learned"
    flattened: Flattened = "passed"

    def __post_init__(self) -> None:
        check_values(BrevitasOptions, vars(self), AdapterError)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> BrevitasOptions:
        """From what `to_json` wrote, in this release or in the first."""
        scale = "statistics" if document["weight_range"] == "max" else "learned"
        return cls(**{"weight_scale": scale, "flattened": "requantized", **document})

    def to_json(self) -> dict[str, Any]:
        """The options as plain JSON values."""
        return {**vars(self), "signed": dict(self.signed)}


def options_of(module: nn.Module) -> BrevitasOptions:
    """The options of a quantized module; raises `AdapterError` for a module of another origin."""
    options = recorded_fact(module, "options")
    if not isinstance(options, BrevitasOptions):
        raise AdapterError(
            f"{type(module).__name__} was not made by BrevitasAdapter's prepare() or load(). Call one of them first."
        )
    return options


def activation_rule(options: BrevitasOptions, ptq: PTQ) -> ActivationRange:
    """The rule for activation ranges that "default" stands for: least squared error wherever the adapter's scales allow it."""
    if ptq.activation_range != "default" or options.quantizer == "duq":
        return ptq.activation_range
    return "percentile" if options.scales == "power-of-two" else "mse"


def check_options(options: BrevitasOptions, ptq: PTQ) -> None:
    """Raise `AdapterError` for what cannot be combined, with the reason."""
    if ptq.equalization != "none" and options.profile == "layerwise":
        raise AdapterError(
            f'equalization="{ptq.equalization}" moves factors through the traced graph from one layer into the next. '
            'Use profile="finn", or equalization="none".'
        )
    if options.scales == "power-of-two" and ptq.activation_range == "mse":
        raise AdapterError(
            'activation_range="mse" finds scales that are no powers of two. Use "percentile" or "max" with '
            'scales="power-of-two".'
        )
    if options.quantizer != "duq":
        return
    refused = {
        "weight_range": (ptq.weight_range == "max", "its weights start at 0.9 of the largest magnitude"),
        "activation_range": (ptq.activation_range != "default", "its activations start at the 95th percentile"),
        "rounding": (ptq.rounding != "nearest", "its codes depend on its clip, not on the scale that rounding methods use"),
    }
    for name, (is_refused, why) in refused.items():
        if is_refused:
            raise AdapterError(f'quantizer="duq" does not take {name}={getattr(ptq, name)!r}: {why}. Leave {name} out.')
