"""What Brevitas can quantize, why it cannot do the rest, and whether it did: nothing stays in float silently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from mpq_brevitas import internals as brevitas
from mpq_brevitas.options import Profile
from mpq_brevitas.subclasses import computes_as_its_parent, differing_forwards, plain_form
from mpq_plugins.adapter.checks import check_tied_weights
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.discover import LAYER_TYPES
from mpq_plugins.model.layers import Inventory, Layer
from mpq_plugins.model.unread import unread_layers
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import ACTIVATION_BITS, WEIGHT_BITS, Precision

_CLASSES: Mapping[str, type[nn.Module]] = {kind.__name__: kind for kind in LAYER_TYPES}


def refuse(layer: Layer, precision: Precision) -> str | None:
    """Why Brevitas cannot have `layer` at `precision`, or None when it can."""
    if layer.kind not in _CLASSES:
        return f"{layer.kind} has no quantized class in Brevitas"
    if layer.functional:
        return "a functional call on a parameter; Brevitas replaces modules only"
    if layer.kind.startswith("ConvTranspose") and layer.groups > 1:
        return "Brevitas has no per-channel scales for grouped transposed convolutions"
    if precision.weight not in WEIGHT_BITS:
        return f"weights have 1 (binary) to 8 bits here, not {precision.weight}"
    if precision.activation not in ACTIVATION_BITS:
        return f"activations have 2 to 8 bits here, not {precision.activation}"
    return None


def advice(layer: Layer, precision: Precision, profile: Profile) -> str | None:
    """What a user should know before deploying `layer` at `precision`, or None."""
    if precision.weight == 1:
        return "binary weights export to QONNX only (BipolarQuant); train after prepare(), or accuracy is lost"
    if profile == "finn" and precision.activation == 8:
        return "FINN builds 255 thresholds per channel for an 8-bit activation; the cost halves with every bit less"
    if profile == "finn" and min(precision.weight, precision.activation) < 4:
        return "below 4 bits FINN computes this layer in LUTs instead of DSPs by default"
    return None


def unconvertible(model: nn.Module, inventory: Inventory, profile: Profile, example: Any = None) -> dict[str, str]:
    """Layer name -> reason, for layers of this model that Brevitas would leave in float or fail on.

    Raises `AdapterError` where the whole model cannot be built by FINN, profile "finn".
    """
    if profile == "finn":
        from mpq_brevitas.finn import check_functions

        check_functions(model)
    modules = dict(model.named_modules())
    reasons: dict[str, str] = {}
    own_forward: dict[str, nn.Module] = {}
    for layer in inventory:
        module = model if modules.get(layer.name) is None else modules[layer.name]
        reason = _reason(layer, module, modules, profile)
        if reason is not None:
            reasons[layer.name] = reason
        elif not computes_as_its_parent(module):
            own_forward[layer.name] = module
    unread = {} if example is None else unread_layers(model, inventory, example)
    return {**unread, **reasons, **_refused_subclasses(model, own_forward, profile, example)}


def _refused_subclasses(
    model: nn.Module, modules: Mapping[str, nn.Module], profile: Profile, example: Any
) -> Mapping[str, str]:
    """Name -> reason, for layers whose forward pass is their own and cannot be kept."""
    if profile == "finn":
        return {
            name: f"{type(module).__name__} has a forward pass of its own that is no convolution or linear layer with one even "
            'padding for every input size, which the graph conversion needs. Use profile="layerwise"'
            for name, module in modules.items()
            if plain_form(module) is None
        }
    if example is None:
        return {
            name: f"{type(module).__name__} has a forward pass of its own; only with an example can it be checked"
            for name, module in modules.items()
        }
    return differing_forwards(model, modules, example) if modules else {}


def _reason(layer: Layer, module: nn.Module, modules: Mapping[str, nn.Module], profile: Profile) -> str | None:
    if layer.functional:
        return "a functional call on a parameter; Brevitas replaces modules only"
    expected = _CLASSES.get(layer.kind)
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized; remove the parametrization first (torch.nn.utils.parametrize)"
    if expected is None or not isinstance(module, expected):
        return f"{type(module).__name__} computes a {layer.kind}, for which Brevitas has no layer in its place"
    if any(isinstance(parent, nn.MultiheadAttention) for parent in _parents(layer.name, modules)):
        return "part of MultiheadAttention, whose forward reads the weight without calling the layer"
    if profile == "finn":
        whole = next((parent for parent in _parents(layer.name, modules) if brevitas.is_traced_whole(parent)), None)
        if whole is not None:
            return f'part of {type(whole).__name__}, which graph tracing takes whole. Use profile="layerwise"'
    if profile == "finn" and layer.n_calls > 1:
        return 'called more than once; the graph conversion needs one call per layer. Use profile="layerwise"'
    if profile == "finn" and layer.aliases:
        return 'registered under several names; the graph conversion needs one. Use profile="layerwise"'
    return None


def _parents(name: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    parts = name.split(".")
    return [modules[".".join(parts[:count])] for count in range(1, len(parts)) if ".".join(parts[:count]) in modules]


def check_convertible(model: nn.Module, bits: BitConfig, inventory: Inventory, profile: Profile, example: Any) -> None:
    """Make sure that every layer of `bits` can be what it is asked to be.

    Raises `UnknownLayerError`, `FingerprintError` and, naming the layers and the reasons, `AdapterError`.
    """
    bits.check(inventory)
    problems = {name: why for name, why in unconvertible(model, inventory, profile, example).items() if name in bits.layers}
    for name, precision in bits.layers.items():
        refused = refuse(inventory[name], precision)
        if refused is not None:
            problems.setdefault(name, f"{precision}: {refused}")
    if problems:
        listed = "; ".join(f"{name}: {why}" for name, why in problems.items())
        raise AdapterError(f"Brevitas cannot quantize {listed}. Exclude these layers from the search, or change the model.")
    check_tied_weights(inventory, bits.layers)


def check_quantized(module: nn.Module, bits: BitConfig, *, inputs: bool) -> None:
    """Raise `AdapterError` for the first layer without the bits it was asked for; `inputs`: it quantizes its own input."""
    for name, precision in bits.layers.items():
        layer: Any = module.get_submodule(name)
        if not brevitas.is_quantized_layer(layer):
            raise AdapterError(f"{name} was left in float ({type(layer).__name__}). Exclude it from the bit configuration.")
        found = {"weight": int(layer.weight_quant.bit_width())}
        if inputs:
            found["activation"] = int(layer.input_quant.bit_width()) if layer.input_quant.is_quant_enabled else 32
        for part, width in found.items():
            asked = getattr(precision, part)
            if width != asked:
                raise AdapterError(f"{name} got {width} {part} bits instead of {asked}. Report this as a defect.")
