"""The finn profile: a traced graph with merged batch normalisation, quantized activations and aligned residual adds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from mpq_brevitas import internals as brevitas
from mpq_brevitas.duq import activation_quantizer, weight_quantizer
from mpq_brevitas.groups import Group, activation_groups_of_graph, quantizers_of_group, rooted
from mpq_brevitas.options import BrevitasOptions
from mpq_brevitas.subclasses import make_plain
from mpq_plugins.adapter.checks import check_agreement
from mpq_plugins.adapter.record import RECORD, record
from mpq_plugins.adapter.stages import told
from mpq_plugins.errors import AdapterError
from mpq_plugins.space.bits import BitConfig

_TIE = (
    "Give them the same, or allocate with this adapter and profile (`mpq allocate --adapter brevitas --adapter-option "
    "profile=finn`), which ties them."
)
UNFED_BITS = 8  # of quantizers that no layer of the bit configuration reads
_NOT_IN_HARDWARE = frozenset(
    "sigmoid hardsigmoid logsigmoid tanh silu gelu hardswish mish softplus elu selu celu softmax logsoftmax softmin".split()
)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class QuantizedGraph(brevitas.GraphModule):
    """A traced module whose deep copies remember what it was prepared with; those of its base forget attributes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedGraph:
        copied: QuantizedGraph = super().__deepcopy__(memo)
        record(copied, **getattr(self, RECORD, {}))
        return copied


@dataclass(frozen=True)
class Converted:
    """A converted graph, per layer the batch normalisation that was merged into it, and the same graph in float."""

    module: nn.Module
    merged: Mapping[str, nn.Module]
    reference: nn.Module


Equalizer = Callable[[Any, Mapping[str, nn.Module]], None]


def convert(model: nn.Module, bits: BitConfig, options: BrevitasOptions, equalizer: Equalizer | None = None) -> Converted:
    """A traced, quantized copy of `model`; layers outside `bits` keep float weights. Not calibrated yet.

    `equalizer` may change the float graph before it is quantized; it gets the merged normalisations by layer, too.

    Raises `AdapterError` when the model cannot be traced, or when layers that share an activation quantizer are asked
    for different activation bits.
    """
    graph = build_graph(model, bits, options, equalizer)
    set_activation_bits(graph.module, bits)
    return graph


def build_graph(
    model: nn.Module, bits: BitConfig | None, options: BrevitasOptions, equalizer: Equalizer | None = None
) -> Converted:
    """The converted graph with every activation at 8 bits; without `bits` weights stay float."""
    copied = rooted(copy.deepcopy(model).eval())
    make_plain(copied)
    with brevitas.guarded():
        try:
            traced = brevitas.preprocess_for_quantize(_traced(copied), trace_model=False, merge_bn=False, relu6_to_relu=False)
            merged = _mergeable_norms(traced)
            traced = brevitas.MergeBatchNorm().apply(traced)
            if equalizer is not None:
                equalizer(traced, {layer: norm for layer, (_, norm) in merged.items()})
            reference = copy.deepcopy(traced)
            module = brevitas.quantize_graph(
                traced,
                requantize_flattened=options.flattened == "requantized",
                quant_identity_map=_identity_map(options),
                quant_act_map=_activation_map(options),
                compute_layer_map={**_float_subclasses(copied), **_layer_map(bits, options)},
            )
        except AdapterError:
            raise
        except Exception as error:
            raise AdapterError(
                f"the graph of {type(model).__name__} could not be traced and converted for FINN: {told(error)}. "
                'Use profile="layerwise", which traces nothing, or remove data-dependent control flow.'
            ) from error
    kept = dict(module.named_modules())
    swallowed = {layer: norm for layer, (name, norm) in merged.items() if name not in kept}
    return Converted(QuantizedGraph(module, module.graph).eval(), swallowed, reference.eval())


def _traced(model: nn.Module) -> Any:
    """The model's graph, with ReLUs written as functions made modules: Brevitas knows only those of `nn.functional`."""
    graph = brevitas.symbolic_trace(model)
    _give_by_position(graph)
    for rewriter in (
        brevitas.FnToModule(torch.relu, nn.ReLU),
        brevitas.FnToModule(torch.relu_, nn.ReLU),
        brevitas.MethodToModule("relu", nn.ReLU),
        brevitas.MethodToModule("relu_", nn.ReLU),
    ):
        graph = rewriter.apply(graph)
    return graph


def _give_by_position(traced: Any) -> None:
    """Rewrite calls of modules by `input=`, in place: Brevitas' rewriters look for inputs by position."""
    for node in traced.graph.nodes:
        if node.op == "call_module" and tuple(node.kwargs) == ("input",):
            node.args, node.kwargs = (node.kwargs["input"],), {}
    traced.recompile()


def _mergeable_norms(traced: Any) -> dict[str, tuple[str, nn.Module]]:
    """Layer -> name and copy of the batch normalisation that is its only reader."""
    found = {}
    for node in traced.graph.nodes:
        if node.op != "call_module" or not isinstance(traced.get_submodule(node.target), _NORMS):
            continue
        source = node.all_input_nodes[0]
        if source.op == "call_module" and len(source.users) == 1:
            found[str(source.target)] = (str(node.target), copy.deepcopy(traced.get_submodule(node.target)))
    return found


def _identity_map(options: BrevitasOptions) -> dict[str, Any]:
    # FINN takes unsigned quantizers only right behind a ReLU, which changes nothing where values are never negative.
    kinds = {"signed": (brevitas.qnn.QuantIdentity, True), "unsigned": (brevitas.qnn.QuantReLU, False)}
    return {
        name: (kind, {"act_quant": activation_quantizer(UNFED_BITS, options, signed=signed), "return_quant_tensor": True})
        for name, (kind, signed) in kinds.items()
    }


def check_functions(model: nn.Module) -> None:
    """Raise `AdapterError` where a layer reads a function of which FINN makes neither thresholds nor hardware.

    At the model's end such a function stays in float, for the host to compute.
    """
    copied = rooted(copy.deepcopy(model).eval())
    with brevitas.guarded():
        try:
            traced = _traced(copied)
        except Exception:  # told with its cause by `build_graph`, which allocation and preparation both come to
            return
    found = []
    for node in traced.graph.nodes:
        name = _function_name(traced, node)
        reader = _layer_behind(traced, node) if name in _NOT_IN_HARDWARE else None
        if reader is not None:
            found.append(f"{node.target if node.op == 'call_module' else node.name} ({name}) in front of {reader}")
    if found:
        listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise AdapterError(
            f"FINN has no hardware for {listed}: it builds activations as thresholds behind ReLU. "
            'Replace them with ReLU and train again, or use profile="layerwise".'
        )


def _function_name(traced: Any, node: Any) -> str:
    if node.op == "call_module":
        return type(traced.get_submodule(node.target)).__name__.lower()
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).replace("_", "")


def _layer_behind(traced: Any, node: Any) -> str | None:
    """The first layer that a value of the graph reaches."""
    waiting, seen = list(node.users), set()
    while waiting:
        reader = waiting.pop(0)
        if reader in seen:
            continue
        seen.add(reader)
        if reader.op == "call_module" and isinstance(traced.get_submodule(reader.target), tuple(brevitas.QUANTIZED)):
            return str(reader.target)
        waiting += reader.users
    return None


def _activation_map(options: BrevitasOptions) -> dict[type[nn.Module], Any]:
    chosen = {}
    for float_class, (quantized, known) in brevitas.QUANT_ACT_MAP.items():
        if float_class in (nn.Hardtanh, nn.Sigmoid):
            # Brevitas' entry of the first holds lambdas that it never evaluates; the layer behind quantizes its input.
            continue  # The second has no layer behind it, or was refused.
        if float_class is nn.ReLU6:
            quantized = brevitas.QuantReLU6
        quantizer = activation_quantizer(UNFED_BITS, options, signed=brevitas.is_signed(known["act_quant"]))
        chosen[float_class] = (quantized, {**known, "act_quant": quantizer})
    return chosen


def _layer_map(bits: BitConfig | None, options: BrevitasOptions) -> dict[type[nn.Module], Any]:
    def quantizer(name: str) -> Any:
        if bits is None or name not in bits.layers:
            return None
        return weight_quantizer(bits[name].weight, options)

    # Brevitas evaluates options per layer only if they are lambdas.
    quantizers = {"weight_quant": lambda _, name: quantizer(name), "bias_quant": None, "return_quant_tensor": False}
    others = {kind: entry for kind, entry in brevitas.COMPUTE_LAYER_MAP.items() if entry is None}
    others |= dict.fromkeys(brevitas.QUANTIZED.values())  # a layer that is called again is converted already
    return {**others, **{kind: (quantized, quantizers) for kind, quantized in brevitas.QUANTIZED.items()}}


def _float_subclasses(model: nn.Module) -> dict[type[nn.Module], None]:
    # Brevitas takes a subclass for a layer, and then looks up its exact class.
    kinds = {type_before_parametrizations(module) for module in model.modules()}
    return {kind: None for kind in kinds if issubclass(kind, tuple(brevitas.QUANTIZED)) and kind not in brevitas.QUANTIZED}


def set_activation_bits(module: nn.Module, bits: BitConfig) -> None:
    """Give every quantizer the bits of the layers that read it; raises `AdapterError` where they disagree."""
    for proxy, width in activation_widths(module, bits).items():
        brevitas.set_activation_bits(proxy, width)


def activation_widths(module: nn.Module, bits: BitConfig) -> dict[Any, int]:
    """The width that `bits` ask of every activation quantizer; raises `AdapterError` where its readers disagree."""
    return {
        quantizer.act_quant: width for group, width in _asked(module, bits) for quantizer in quantizers_of_group(module, group)
    }


def _asked(module: nn.Module, bits: BitConfig) -> Iterator[tuple[Group, int]]:
    for group in activation_groups_of_graph(module):
        check_agreement([group.layers], bits.layers, "activation", _TIE)
        yield group, next((bits[name].activation for name in group.layers if name in bits.layers), UNFED_BITS)


def check_activations(module: nn.Module, bits: BitConfig) -> None:
    """Raise `AdapterError` naming the first layer that is not fed by a quantizer of the asked bits."""
    fed = {name: group for group in activation_groups_of_graph(module) for name in group.layers}
    for name, precision in bits.layers.items():
        if name not in fed:
            raise AdapterError(
                f'{name} is not fed by an activation quantizer in the traced graph. Exclude it, or use profile="layerwise".'
            )
        found = {int(module.get_submodule(quantizer).act_quant.bit_width()) for quantizer in fed[name].quantizers}
        if found != {precision.activation}:
            raise AdapterError(
                f"{name} got {found} activation bits instead of {precision.activation}. Report this as a defect."
            )
