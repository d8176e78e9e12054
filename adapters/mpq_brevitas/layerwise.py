"""The layerwise profile: every layer is replaced where it stands; no graph is traced."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.modules import aliases, get_layer, rooted, set_layer, tie_parameters, tied_parameters
from mpq_brevitas.quantizers import activation_quantizer, weight_quantizer
from mpq_brevitas.recipe import Recipe
from mpq_brevitas.subclasses import as_exact_layers, restore_forward
from mpq_plugins.model.run import Batch, call, evaluating, tensors
from mpq_plugins.quantizers.histogram import Histogram
from mpq_plugins.space.bits import BitConfig


def observe_inputs(model: nn.Module, histograms: Mapping[str, Histogram], batches: Sequence[Batch]) -> None:
    """Count the inputs of the layers named in `histograms` over `batches`; `model` is rooted."""
    with contextlib.ExitStack() as stack:
        for name, histogram in histograms.items():

            def observe(_module: nn.Module, args: object, keywords: object, histogram: Histogram = histogram) -> None:
                for tensor in tensors((args, keywords)):
                    histogram.add(tensor)

            stack.callback(get_layer(model, name).register_forward_pre_hook(observe, with_kwargs=True).remove)
        stack.enter_context(evaluating(model))
        for batch in batches:
            call(model, batch.inputs)


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
    _leave_fused_paths(converted)
    _restore_trainability(converted, trainable)
    return converted.eval()


def _is_layer(model: nn.Module, name: str) -> bool:
    return type_before_parametrizations(get_layer(model, name)) in brevitas.QUANTIZED


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
