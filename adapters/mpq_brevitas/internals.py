"""Every Brevitas name that is not documented as public, in one place, behind the version check."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpq_plugins.errors import AdapterError, MissingExtraError
from mpq_plugins.model.discover import LAYER_TYPES

LOWEST, BELOW = (0, 13), (0, 14)
_INSTALL = "Install it: pip install 'mpq-plugins[brevitas]'."


def require_brevitas() -> None:
    """Raise `MissingExtraError` without Brevitas and `AdapterError` for a version outside the tested range."""
    try:
        installed = importlib.metadata.version("brevitas")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError(f"the Brevitas adapter needs brevitas, which is not installed. {_INSTALL}") from error
    if not LOWEST <= _major_minor(installed) < BELOW:
        raise AdapterError(
            f"brevitas {installed} is installed; this adapter knows brevitas >={_text(LOWEST)},<{_text(BELOW)}. "
            f"Install it: pip install 'brevitas>={_text(LOWEST)},<{_text(BELOW)}'."
        )


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


require_brevitas()
# The version is checked before any name that another version may lack.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # torch warns of a missing CUDA runtime when Brevitas looks for a compiler.
    try:
        import brevitas.nn as qnn
        from brevitas import config
        from brevitas.core.bit_width import BitWidthStatefulConst
        from brevitas.core.stats import stats_op
        from brevitas.fx import GraphModule as GraphModule
        from brevitas.fx.brevitas_tracer import Tracer, _symbolic_trace
        from brevitas.graph import quantize as graph_quantize
        from brevitas.graph import quantize_impl
        from brevitas.graph.base import FnToModule as FnToModule
        from brevitas.graph.base import MethodToModule as MethodToModule
        from brevitas.graph.calibrate import quantization_status_manager
        from brevitas.graph.equalize import EqualizeGraph as EqualizeGraph
        from brevitas.graph.equalize import GraphActivationEqualization as GraphActivationEqualization
        from brevitas.graph.fixed_point import MergeBatchNorm as MergeBatchNorm
        from brevitas.graph.quantize import COMPUTE_LAYER_MAP as COMPUTE_LAYER_MAP
        from brevitas.graph.quantize import QUANT_ACT_MAP as QUANT_ACT_MAP
        from brevitas.graph.quantize import layerwise_quantize as layerwise_quantize
        from brevitas.graph.quantize import preprocess_for_quantize as preprocess_for_quantize
        from brevitas.inject.enum import (
            BitWidthImplType,
            FloatToIntImplType,
            QuantType,
            RestrictValueType,
            ScalingImplType,
            ScalingPerOutputType,
            StatsOp,
        )
        from brevitas.nn.quant_layer import QuantNonLinearActLayer
        from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector
        from brevitas.quant.fixed_point import (
            Int8ActPerTensorFixedPoint,
            Int8WeightPerTensorFixedPoint,
            Int8WeightPerTensorFixedPointMSE,
            Uint8ActPerTensorFixedPoint,
        )
        from brevitas.quant.scaled_int import (
            Int8ActPerTensorFloat,
            Int8WeightPerChannelFloat,
            Int8WeightPerChannelFloatMSE,
            Int8WeightPerTensorFloat,
            Uint8ActPerTensorFloat,
        )
        from brevitas.quant.solver import ActQuantSolver as ActQuantSolver
        from brevitas.quant.solver import WeightQuantSolver
    finally:
        logging.disable(_level)

# Brevitas looks layers up by their exact class.
QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {kind: getattr(qnn, f"Quant{kind.__name__}") for kind in LAYER_TYPES}


class _OwnForward:
    """A Brevitas layer that computes with the forward pass of the float class that it replaced."""

    own_class: type[nn.Module]

    def inner_forward_impl(self, x: Any, quant_weight: Any, quant_bias: Any) -> Tensor:
        form: Any = object.__new__(self.own_class)  # the float layer, with quantized values in place of its parameters
        form.__dict__.update(self.__dict__)
        form.__dict__["_parameters"] = {
            name: value for name, value in self.__dict__["_parameters"].items() if name not in ("weight", "bias")
        }
        form.__dict__.update(weight=plain(quant_weight), bias=plain(quant_bias))
        result: Tensor = form.forward(plain(x))
        return result


# One class each, rather than one made for every layer: Brevitas and its users look layers up by class.
_WITH_OWN_FORWARD = {
    kind: type(f"_Own{kind.__name__}", (_OwnForward, kind), {"__module__": __name__}) for kind in QUANTIZED.values()
}
globals().update({kind.__name__: kind for kind in _WITH_OWN_FORWARD.values()})  # where pickle looks for them
_FLOAT_WEIGHTS = {"mse": Int8WeightPerChannelFloatMSE, "max": Int8WeightPerChannelFloat}
_POWER_OF_TWO_WEIGHTS = {"mse": Int8WeightPerTensorFixedPointMSE, "max": Int8WeightPerTensorFixedPoint}


class BinaryWeightPerChannel(WeightQuantSolver):
    """Weights s_c * sign(w) with s_c = mean |w_c| over output channel c: XNOR-Net, section 3.1; exports BipolarQuant.

    Brevitas' integer quantizers divide by zero at one bit, and its binary ones have a constant scale.
    """

    quant_type = QuantType.BINARY
    bit_width = 1
    bit_width_impl_type = BitWidthImplType.CONST
    signed = True
    narrow_range = True
    scaling_impl_type = ScalingImplType.STATS
    scaling_stats_op = StatsOp.AVE
    scaling_per_output_type = ScalingPerOutputType.CHANNEL
    restrict_scaling_type = RestrictValueType.FP
    float_to_int_impl_type = FloatToIntImplType.ROUND
    scaling_min_val = 1e-10


class _LimitedReLU(nn.Module):
    """What `nn.ReLU6` computes; that class itself Brevitas drops in front of a quantizer."""

    def __init__(self) -> None:  # Brevitas reads the signature
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu6(x)


class QuantReLU6(qnn.QuantReLU):
    """A ReLU6 that quantizes its output. Brevitas' own loses the limit as soon as the range comes from data."""

    def __init__(self, act_quant: Any, return_quant_tensor: bool = False, **options: Any) -> None:
        QuantNonLinearActLayer.__init__(
            self,
            act_impl=_LimitedReLU,
            passthrough_act=False,
            input_quant=None,
            act_quant=act_quant,
            return_quant_tensor=return_quant_tensor,
            **options,
        )


def drop_needless_limits(module: nn.Module) -> None:
    """Make every ReLU6 whose quantizer clips at the limit or below a ReLU, in place: FINN knows no Clip."""
    for layer in module.modules():
        if isinstance(layer, QuantReLU6) and layer.act_quant.is_quant_enabled:
            bits, _ = activation_format(layer.act_quant)
            if torch.all(torch.round(6 / layer.act_quant.scale()) >= 2**bits - 1):
                layer.act_quant.fused_activation_quant_proxy.activation_impl = nn.ReLU()


class _LayerTracer(Tracer):
    """Takes subclasses of layers whole: what they compute from the input's size cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, tuple(QUANTIZED)) or bool(super().is_leaf_module(m, module_qualified_name))


_PASSING_FUNCTIONS = frozenset(
    (
        *(torch.cat, torch.reshape, torch.flatten, torch.transpose, torch.squeeze, torch.unsqueeze, torch.mean),
        *(nn.functional.avg_pool2d, nn.functional.max_pool2d, nn.functional.adaptive_avg_pool2d),
        *quantize_impl.ADD_FNS,
    )
)
_PASSING_METHODS = frozenset(
    "view reshape flatten t permute transpose squeeze unsqueeze contiguous mean".split() + list(quantize_impl.ADD_METHODS)
)
_NEVER_NEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, qnn.QuantReLU, qnn.QuantSigmoid)


def inputs_are_unsigned(model: Any, node: Any, *_: Any) -> bool:
    """Whether nothing that a node of a traced graph reads is ever negative, as far as the graph shows.

    Brevitas' own answer takes every quantizer without a sign for an unsigned one, the sum of signed values included.
    """
    sources = node.all_input_nodes
    return bool(sources) and all(_is_never_negative(model, source) for source in sources)


def _is_never_negative(model: Any, node: Any) -> bool:
    if node.op == "call_module":
        called = model.get_submodule(node.target)
        if isinstance(called, _NEVER_NEGATIVE):
            return True
        passes = isinstance(called, (qnn.QuantIdentity, nn.Flatten, *quantize_impl.SIGN_PRESERVING_MODULES))
    else:
        passes = (node.op == "call_function" and node.target in _PASSING_FUNCTIONS) or (
            node.op == "call_method" and node.target in _PASSING_METHODS
        )
    return passes and inputs_are_unsigned(model, node)


_align = graph_quantize.align_input_quant


def _aligned(module: Any, shared: Any, name: str, identity_map: Any, align_sign: bool) -> Any:
    """Brevitas' choice of how an operand comes to the shared scale; a ReLU never becomes signed, which FINN cannot have.

    Where operands must agree in sign, such as those of a concatenation, the shared quantizer follows the ReLU's own.
    """
    if align_sign and isinstance(module, qnn.QuantReLU) and shared.act_quant.is_signed:
        return name
    return _align(module, shared, name, identity_map, align_sign)


def quantize_graph(traced: Any, *, requantize_flattened: bool, **maps: Any) -> Any:
    """Brevitas' graph quantization, with signs as the graph shows them."""
    names = ("are_inputs_unsigned", "MAX_RESIDUAL_ITERS", "PRECISION_PRESERVING_MODULES", "SIGN_PRESERVING_MODULES")
    before = {name: getattr(quantize_impl, name) for name in names}
    quantize_impl.are_inputs_unsigned, graph_quantize.align_input_quant = inputs_are_unsigned, _aligned
    # Operands that cannot be aligned make the graph grow at every one of Brevitas' 9,999 attempts.
    quantize_impl.MAX_RESIDUAL_ITERS = 2 * len(traced.graph.nodes)
    if not requantize_flattened:  # Brevitas knows the function only, and quantizes again, signed, behind the module.
        for name in names[2:]:
            setattr(quantize_impl, name, (*before[name], nn.Flatten))
    try:
        return graph_quantize.quantize(traced, requantize_layer_handler_output=False, **maps)
    finally:
        graph_quantize.align_input_quant = _align
        for name, value in before.items():
            setattr(quantize_impl, name, value)


def is_traced_whole(module: nn.Module) -> bool:
    """Whether tracing takes the module for one operation, so that layers inside it cannot be replaced."""
    is_called = type(module).forward is not nn.Module.forward  # lists of modules only hold them
    return is_called and bool(_LayerTracer().is_leaf_module(module, ""))


def symbolic_trace(module: nn.Module) -> Any:
    """The graph of a module, as Brevitas traces it."""
    return _symbolic_trace(_LayerTracer(), module, None)


def weight_quantizer(bits: int, weight_range: str, *, power_of_two: bool = False, learned: bool = True) -> Any:
    """The quantizer class of a weight; its bit-width is part of the state dict, and so is its scale when `learned`."""
    if bits == 1:
        return BinaryWeightPerChannel
    base = (_POWER_OF_TWO_WEIGHTS if power_of_two else _FLOAT_WEIGHTS)[weight_range]
    if learned:
        base = base.let(scaling_impl_type="parameter_from_stats")
    return base.let(bit_width=int(bits), bit_width_impl_type="stateful_const")


def activation_quantizer(bits: int, *, signed: bool, power_of_two: bool = False) -> Any:
    """The quantizer class of an activation; its bit-width is part of the state dict."""
    if power_of_two:
        base = Int8ActPerTensorFixedPoint if signed else Uint8ActPerTensorFixedPoint
    else:
        base = Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat
    return base.let(bit_width=int(bits), bit_width_impl_type="stateful_const")


def use_fixed_weight_quantizer(layer: Any, bits: int, threshold: Tensor) -> None:
    """Quantize the weight of a layer per tensor, the largest code at `threshold`; learned from there on."""
    quantizer = Int8WeightPerTensorFloat.let(
        bit_width=int(bits), bit_width_impl_type="stateful_const", scaling_impl_type="parameter", scaling_init=float(threshold)
    )
    layer.weight_quant = WeightQuantProxyFromInjector(layer, quantizer)


def use_fixed_input_quantizer(layer: Any, bits: int, threshold: Tensor, *, signed: bool) -> None:
    """Quantize the input of a layer, the largest code at `threshold`, symmetric when signed; learned from there on."""
    quantizer = activation_quantizer(bits, signed=signed)
    layer.input_quant = ActQuantProxyFromInjector(
        layer, quantizer.let(narrow_range=signed, scaling_impl_type="parameter", scaling_init=float(threshold))
    )


def run_forward_of(layer: nn.Module, float_class: type[nn.Module]) -> None:
    """Let a Brevitas layer compute with the forward pass of `float_class`, a subclass of the layer class it stands for."""
    layer.__class__ = _WITH_OWN_FORWARD[type(layer)]
    layer.own_class = float_class


def is_brevitas_layer(module: nn.Module) -> bool:
    """Whether the module is one of the layers that Brevitas puts in place of torch's."""
    return isinstance(module, tuple(QUANTIZED.values()))


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether the module is one of Brevitas' layers with both quantizers, or fed by a quantized activation."""
    return is_brevitas_layer(module) and bool(module.weight_quant.is_quant_enabled)


def has_activation_quantizer(module: nn.Module) -> bool:
    """Whether the module is an activation that quantizes its output."""
    return hasattr(module, "act_quant") and bool(module.act_quant.is_quant_enabled)


def activation_tensor_quant(proxy: Any) -> Any:
    """The quantizing module inside an activation's proxy."""
    return proxy.fused_activation_quant_proxy.tensor_quant


def is_signed(quantizer: Any) -> bool:
    """Whether a quantizer class gives negative codes."""
    return bool(quantizer.signed)


def activation_proxies(module: nn.Module) -> Iterator[Any]:
    """Every active quantizer of an activation, whether in front of a layer or behind an activation function."""
    return (part for part in module.modules() if isinstance(part, ActQuantProxyFromInjector) and part.is_quant_enabled)


def activation_format(proxy: Any) -> tuple[int, bool]:
    """Bits and sign of an activation quantizer, also while it is switched off."""
    return int(activation_tensor_quant(proxy).msb_clamp_bit_width_impl()), is_signed(proxy.quant_injector)


def unquantized(proxy: Any, value: Any) -> Tensor:
    """What an activation's quantizer is given: the input of its proxy, behind the activation function that is part of it."""
    result: Tensor = proxy.fused_activation_quant_proxy.activation_impl(plain(value))
    return result


def set_activation_threshold(proxy: Any, threshold: Tensor) -> None:
    """Let the largest code of a calibrated activation quantizer stand for `threshold` from now on, in place."""
    scaling = activation_tensor_quant(proxy).scaling_impl
    with torch.no_grad():
        # Powers of two are learned as their exponents.
        scaling.value.copy_(scaling.restrict_inplace_preprocess(threshold.clone().reshape(scaling.value.shape)))


def refit_weight_scale(layer: Any) -> None:
    """Search the range of a weight again as its quantizer does at first, for the bits it has now; in place."""
    proxy = layer.weight_quant
    scaling = getattr(proxy.tensor_quant, "scaling_impl", None)
    if learned_scale(proxy) is None or not hasattr(scaling, "init_done"):
        return
    _rebind_searches(proxy)
    was_off, proxy.disable_quant = proxy.disable_quant, False  # a weight that passes would leave the search undone
    try:
        with torch.no_grad():
            scaling.value.fill_(1.0)  # Brevitas multiplies what it finds into it
            scaling.init_done = False
            layer.quant_weight()
    finally:
        proxy.disable_quant = was_off


def _rebind_searches(proxy: Any) -> None:
    """Let searches for a range switch the quantizer they stand in: in a deep copy they still switch that of the original."""
    for search in proxy.modules():
        if isinstance(search, stats_op.MSE):
            before = search.previous_observer_mode
            search.proxy_forward = proxy.forward
            search.set_local_loss_mode = functools.partial(stats_op._set_local_loss_mode, proxy)
            search.set_observer_mode = functools.partial(_observing, proxy, before)
            search.restore_observer_mode = functools.partial(stats_op._restore_observer_mode, proxy, before)
            search.restore_offload_param = functools.partial(stats_op._restore_params, proxy)


def _observing(proxy: Any, before: dict[str, bool], enabled: bool) -> None:
    stats_op._set_observer_mode(proxy, enabled, before)


def set_weight_quantization(layer: Any, on: bool) -> None:
    """Quantize the weight of a layer, or pass it as it is."""
    layer.weight_quant.disable_quant = not on


@contextlib.contextmanager
def without_quantization(module: nn.Module) -> Iterator[None]:
    """Compute with the weights, biases and activations that are not quantized; modes and switches come back."""
    training = module.training
    with quantization_status_manager(
        module, disable_act_quant=True, disable_weight_quant=True, disable_bias_quant=True, is_training=training
    ):
        yield


def scale_identity(module: nn.Module) -> int:
    """A number that two activation quantizers have in common exactly if they share their scale."""
    return id(activation_tensor_quant(module.act_quant).scaling_impl)


def set_activation_bits(proxy: Any, bits: int) -> None:
    """Change an activation quantizer's bits in place; its float threshold stays, the scale follows."""
    _set_bits(proxy, activation_tensor_quant(proxy), bits)


def set_weight_bits(proxy: Any, bits: int) -> None:
    """Change a weight quantizer's bits in place; a statistics-based scale follows."""
    _set_bits(proxy, proxy.tensor_quant, bits)


def _set_bits(proxy: Any, tensor_quant: Any, bits: int) -> None:
    old = tensor_quant.msb_clamp_bit_width_impl
    device = old.bit_width.device if isinstance(old, BitWidthStatefulConst) else None
    tensor_quant.msb_clamp_bit_width_impl = BitWidthStatefulConst(int(bits), device=device)
    # Loading a state dict rebuilds quantizers from their injector, which must therefore agree.
    proxy.quant_injector = proxy.quant_injector.let(bit_width=int(bits), bit_width_impl_type="stateful_const")


def learned_scale(proxy: Any) -> Tensor | None:
    """The learned scale of a weight quantizer (MSE ranges); None where the scale is computed from the weight."""
    scaling = getattr(proxy.tensor_quant, "scaling_impl", None)
    value = getattr(scaling, "value", None)
    return value if isinstance(value, nn.Parameter) else None


def plain(value: Any) -> Any:
    """The tensor inside a Brevitas quant tensor; anything else as it is."""
    return value.value if hasattr(value, "zero_point") and hasattr(value, "value") else value


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Silence Brevitas' and torch's warnings, and put Brevitas' global switches back whatever happens.

    A conversion that fails leaves `IGNORE_MISSING_KEYS` on for the whole process.
    """
    missing, rebuild = config.IGNORE_MISSING_KEYS, config.REINIT_ON_STATE_DICT_LOAD
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        config.IGNORE_MISSING_KEYS, config.REINIT_ON_STATE_DICT_LOAD = missing, rebuild


@contextlib.contextmanager
def keeping_quantizers() -> Iterator[None]:
    """While a state dict is loaded, fill the quantizers there are, instead of building new ones.

    New ones would lose the scales that residual adds share.
    """
    with guarded():
        config.REINIT_ON_STATE_DICT_LOAD = False
        yield


def greedy_rounding(module: nn.Module, method: str) -> Any:
    """Brevitas' mode of GPTQ, GPFQ or Qronos, with quantized activations and the float weights kept beside."""
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode
    from brevitas.graph.qronos import Qronos

    if method == "gptq":
        return gptq_mode(module, create_weight_orig=True, use_quant_activations=True)
    options = {"algorithm_impl": Qronos} if method == "qronos" else {}
    return gpfq_mode(module, create_weight_orig=True, use_quant_activations=True, **options)


@contextlib.contextmanager
def learned_rounding(layer: Any) -> Iterator[Any]:
    """Round the weight of a layer up or down as a parameter says, which starts at its fraction; to the nearest afterwards."""
    from brevitas.core.function_wrapper.learned_round import LearnedRoundHardSigmoid, LearnedRoundSte
    from brevitas_examples.common.learned_round.learned_round_method import learned_round_value_init_non_linear

    integer = layer.weight_quant.tensor_quant.int_quant
    nearest = integer.float_to_int_impl
    with torch.no_grad():
        start = learned_round_value_init_non_linear(layer)
    rounding = LearnedRoundSte(LearnedRoundHardSigmoid(), start, nn.Identity()).to(layer.weight.device).train()
    integer.float_to_int_impl = rounding
    try:
        yield rounding
    finally:
        integer.float_to_int_impl = nearest


def rounding_regularisation(layer: Any, n_steps: int) -> Any:
    """AdaRound's regularisation, which makes a layer's learned rounding decide within `n_steps`."""
    from brevitas_examples.common.learned_round.learned_round_method import RoundRegularisationLoss

    return RoundRegularisationLoss(layer, max_count=n_steps)
