"""The layerwise profile: every layer is replaced where it stands; no graph is traced."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas._modules import aliases, get_layer, rooted, set_layer, tie_parameters, tied_parameters
from mpq_brevitas._quantizers import activation_quantizer, weight_quantizer
from mpq_brevitas._recipe import Recipe
from mpq_brevitas._subclasses import as_exact_layers, restore_forward
from mpq_plugins._bits import BitConfig
from mpq_plugins._model import Batch, call, evaluating, tensors


def signed_inputs(model: nn.Module, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, bool]:
    """Layer name -> whether its input was ever negative over `batches`; an unsigned quantizer saves a bit otherwise."""
    model = rooted(model)
    lowest = dict.fromkeys(names, torch.inf)
    handles = []
    for name in names:

        def observe(_module: nn.Module, inputs: tuple[object, ...], name: str = name) -> None:
            for tensor in tensors(inputs):
                lowest[name] = min(lowest[name], float(tensor.min()))

        handles.append(get_layer(model, name).register_forward_pre_hook(observe))
    try:
        with evaluating(model):
            for batch in batches:
                call(model, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value < 0 for name, value in lowest.items()}


def convert(model: nn.Module, bits: BitConfig, recipe: Recipe) -> nn.Module:
    """A copy of `model` whose layers in `bits` are Brevitas layers; the others stay float. Not calibrated yet."""
    converted = rooted(copy.deepcopy(model).eval())
    later_names, ties = aliases(converted), tied_parameters(converted)
    trainable = {name: parameter.requires_grad for name, parameter in converted.named_parameters()}
    # Brevitas evaluates options per layer only if they are lambdas.
    options = {
        "weight_quant": lambda _, name: weight_quantizer(bits[name].weight, recipe),
        "input_quant": lambda _, name: activation_quantizer(bits[name].activation, recipe, signed=recipe.signed[name]),
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    subclasses = as_exact_layers(converted, bits.layers)
    names = {name for name, _ in converted.named_modules(remove_duplicate=False)}
    with brevitas.guarded():
        converted = brevitas.layerwise_quantize(
            converted,
            compute_layer_map={float_class: (quantized, options) for float_class, quantized in brevitas.QUANTIZED.items()},
            name_blacklist=sorted(name for name in names if _is_layer(converted, name) and name not in bits.layers),
        )
    for name, subclass in subclasses.items():
        restore_forward(get_layer(converted, name), subclass)
    # Brevitas leaves the later registrations of a module in float, and parts parameters that were one.
    for later, first in later_names.items():
        if first in bits.layers:
            set_layer(converted, later, get_layer(converted, first))
    tie_parameters(converted, ties)
    _restore_trainability(converted, trainable)
    return converted.eval()


def _is_layer(model: nn.Module, name: str) -> bool:
    return type_before_parametrizations(get_layer(model, name)) in brevitas.QUANTIZED


def _restore_trainability(model: nn.Module, trainable: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable.get(name, parameter.requires_grad))
