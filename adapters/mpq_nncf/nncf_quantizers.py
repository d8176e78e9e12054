"""What NNCF has placed: the quantizers of a module, their widths and ranges, and the module at rest."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpq_nncf.internals import private


@dataclass(frozen=True)
class Hook:
    """A placed quantizer: `name` in the hook storage, and the operation and port it stands before (or after)."""

    name: str
    operation: str
    port: int
    before: bool


def hooks(module: nn.Module) -> tuple[Hook, ...]:
    """All quantizers of a module, a shared one once per place."""
    names = private()
    found = []
    for name, quantizer in names["get_hook_storage"](module).named_hooks(remove_duplicate=False):
        if isinstance(quantizer, names["BaseQuantizer"]):
            kind, operation, port = names["decode_hook_name"](name)
            found.append(Hook(name, operation, port, kind == "pre_hooks"))
    return tuple(found)


def quantizer_at(module: nn.Module, hook_name: str) -> nn.Module:
    """The quantizer that stands at a place."""
    quantizer: nn.Module = private()["get_hook_storage"](module).get_submodule(hook_name)
    return quantizer


def replace_quantizer(module: nn.Module, hook_name: str, quantizer: nn.Module) -> None:
    """Put another module at the place of a quantizer."""
    storage = private()["get_hook_storage"](module)
    place, _, key = hook_name.rpartition(".")
    storage.get_submodule(place)[key] = quantizer


def bits_of(quantizer: Any) -> int:
    """The width of a placed quantizer."""
    return int(quantizer.num_bits)


def set_quantizer_bits(quantizer: Any, bits: int) -> None:
    """Switch the width of a placed quantizer; its range stays."""
    quantizer.num_bits = bits
    # The property leaves the specification behind, and a checkpoint would restore the old width from it.
    quantizer._qspec.num_bits = bits


def refresh_levels(quantizer: Any) -> None:
    """Recompute the levels from the bits; asymmetric quantizers do not do so themselves after loading."""
    quantizer.set_levels()


def set_weight_limit(quantizer: Any, limit: Any) -> None:
    """Give a symmetric weight quantizer the value of its highest code."""
    quantizer.scale.data.copy_(limit.reshape(quantizer.scale.shape))


def weight_step(quantizer: Any) -> Any:
    """The step between two codes of a symmetric quantizer, in its broadcast shape."""
    return (quantizer.scale.detach().abs() + quantizer.eps) / quantizer.level_high


@dataclass(frozen=True)
class ActivationKind:
    """What an activation quantizer can have: codes from `lowest` to `highest`, a zero point when `asymmetric`."""

    asymmetric: bool
    signed: bool
    lowest: int
    highest: int

    @property
    def n_levels(self) -> int:
        """How many codes there are."""
        return self.highest - self.lowest + 1


def activation_kind(quantizer: Any) -> ActivationKind:
    """The kind of a placed activation quantizer; calibration decided whether it is signed."""
    asymmetric = isinstance(quantizer, private()["AsymmetricQuantizer"])
    return ActivationKind(asymmetric, asymmetric or quantizer.signed, quantizer.level_low, quantizer.level_high)


def channels_of(quantizer: Any) -> int:
    """How many ranges an activation quantizer has: one, or one per channel."""
    return int(math.prod(quantizer.scale_shape))


def set_activation_range(quantizer: Any, low: Any, high: Any) -> None:
    """Give an activation quantizer its lowest and highest values, one for all channels or one for each."""
    if isinstance(quantizer, private()["AsymmetricQuantizer"]):
        quantizer.input_low.data.copy_(_of_shape(low, quantizer.input_low))
        quantizer.input_range.data.copy_(_of_shape(high - low, quantizer.input_range))
    else:
        quantizer.scale.data.copy_(_of_shape(high, quantizer.scale))


def _of_shape(values: Any, like: Any) -> Any:
    return values.expand(like.numel()).reshape(like.shape)


def pass_through(quantizer: Any, *, on: bool) -> None:
    """Let a quantizer return its input, or quantize again; nothing of this shows in the state dict.

    NNCF's own switch is a buffer, which a checkpoint would keep, and it freezes the range.
    """
    if on:
        quantizer.forward = _unchanged
    else:
        vars(quantizer).pop("forward", None)


def passes_through(quantizer: Any) -> bool:
    """Whether a quantizer returns its input."""
    return "forward" in vars(quantizer)


def _unchanged(value: Any) -> Any:
    return value


def quantized(quantizer: Any, value: Any) -> Any:
    """What a quantizer makes of `value`, also while it lets its input through."""
    return type(quantizer).forward(quantizer, value)


@dataclass(frozen=True)
class Grid:
    """Levels of a quantizer: value = (code - zero_point) * step, codes from `low` to `high`; tensors in broadcast shape."""

    step: Any
    zero_point: Any
    low: int
    high: int


def as_one_range(quantizer: Any) -> None:
    """Let a weight quantizer of a single channel pass for one of the whole weight; its range stays.

    NNCF's export takes the longest axis of the scale for that of the channels, which is the first where all are 1.
    """
    if math.prod(quantizer.scale_shape) == 1:
        quantizer._scale_shape = (1,)


def activation_grid(quantizer: Any) -> Grid:
    """The grid of an activation quantizer; codes of unsigned and asymmetric ones start at 0, signed ones are symmetric."""
    import torch

    low, high = (value.detach() for value in quantizer.get_input_low_input_high())
    step = (high - low) / (quantizer.levels - 1)
    if isinstance(quantizer, private()["AsymmetricQuantizer"]):
        return Grid(step, torch.round(-low / step), 0, quantizer.levels - 1)
    return Grid(step, torch.zeros_like(step), quantizer.level_low, quantizer.level_high)


def placement(module: nn.Module) -> dict[str, Any]:
    """NNCF's description of where which quantizer stands, as plain JSON values."""
    described: dict[str, Any] = json.loads(json.dumps(importlib.import_module("nncf.torch").get_config(module)))
    return described


def place(model: nn.Module, description: dict[str, Any]) -> nn.Module:
    """Put quantizers as described onto `model`, in place."""
    scheme = private()["QuantizationScheme"]
    for command in description["compression_state"]:
        config = command["module_config"]
        if "mode" in config:  # SmoothQuant's multiplications have none
            config["mode"] = scheme(config["mode"])
        config["scale_shape"] = tuple(config["scale_shape"])
    module: nn.Module = importlib.import_module("nncf.torch").load_from_config(model, description)
    return module
