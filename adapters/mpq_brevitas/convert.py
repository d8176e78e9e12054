"""A float model with Brevitas' layers: replaced where they stand, or in a traced graph (`finn`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from mpq_brevitas import finn
from mpq_brevitas import internals as brevitas
from mpq_brevitas.duq import activation_quantizer, weight_quantizer
from mpq_brevitas.finn import Converted
from mpq_brevitas.groups import aliases, rooted, tie_parameters, tied_parameters
from mpq_brevitas.options import BrevitasOptions
from mpq_brevitas.subclasses import as_exact_layers, restore_forward
from mpq_plugins.space.bits import BitConfig


def convert(model: nn.Module, bits: BitConfig, options: BrevitasOptions, equalizer: finn.Equalizer | None = None) -> Converted:
    """What the profile makes of a copy of `model`, not calibrated yet; `equalizer` is for "finn" only."""
    if options.profile == "finn":
        return finn.convert(model, bits, options, equalizer)
    return Converted(_layerwise(model, bits, options), {}, rooted(model))


def _layerwise(model: nn.Module, bits: BitConfig, options: BrevitasOptions) -> nn.Module:
    """A copy of `model` whose layers in `bits` are Brevitas layers; the others stay float, no graph is traced."""
    converted = rooted(copy.deepcopy(model).eval())
    later_names, ties = aliases(converted), tied_parameters(converted)
    trainable = {name: parameter.requires_grad for name, parameter in converted.named_parameters()}
    # Brevitas evaluates options per layer only if they are lambdas.
    quantizers = {
        "weight_quant": lambda _, name: weight_quantizer(bits[name].weight, options),
        "input_quant": lambda _, name: activation_quantizer(bits[name].activation, options, signed=options.signed[name]),
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    subclasses = as_exact_layers(converted, bits.layers)
    names = {name for name, _ in converted.named_modules(remove_duplicate=False)}
    with brevitas.guarded():
        converted = brevitas.layerwise_quantize(
            converted,
            compute_layer_map={float_class: (quantized, quantizers) for float_class, quantized in brevitas.QUANTIZED.items()},
            name_blacklist=sorted(name for name in names if _is_layer(converted, name) and name not in bits.layers),
        )
    for name, subclass in subclasses.items():
        restore_forward(converted.get_submodule(name), subclass)
    # Brevitas leaves the later registrations of a module in float, and parts parameters that were one.
    for later, first in later_names.items():
        if first in bits.layers:
            converted.set_submodule(later, converted.get_submodule(first))
    tie_parameters(converted, ties)
    _leave_fused_paths(converted)
    _restore_trainability(converted, trainable)
    return converted.eval()


def _is_layer(model: nn.Module, name: str) -> bool:
    return type_before_parametrizations(model.get_submodule(name)) in brevitas.QUANTIZED


def _leave_fused_paths(model: nn.Module) -> None:
    """Keep torch's fused encoder kernel off quantized layers: it reads their float weights and calls no layer.

    torch takes it in evaluation mode without gradients, unless it knows another activation than ReLU and GELU.
    """
    for module in model.modules():
        if not any(brevitas.is_quantized_layer(part) for part in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # nested tensors are for the fused kernel alone


def _restore_trainability(model: nn.Module, trainable: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
