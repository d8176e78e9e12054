"""Every private name of NNCF that this adapter touches, checked against the installed version.

The rest of the adapter sees only the functions and values of this file. NNCF's own quantizer placement, calibration and
bias correction run unchanged inside the public `nncf.quantize`; what is edited is the quantizer setup it computes on the
way (`MinMaxQuantization.find_quantization_setup`) and the quantizers right after they are placed (`.apply`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpq_plugins._errors import AdapterError
from mpq_plugins._plugins import require

SUPPORTED = ((3, 0), (4, 0))  # from, below
TESTED = "3.4"

_MIN_MAX = "nncf.quantization.algorithms.min_max.algorithm"
_HOOKS = "nncf.torch.function_hook"
_STRUCTS = "nncf.common.quantization"
# name -> module that holds it; a dot reaches into the class.
_NAMES = {
    "MinMaxQuantization": _MIN_MAX,
    "MinMaxQuantization.find_quantization_setup": _MIN_MAX,
    "MinMaxQuantization.apply": _MIN_MAX,
    "MinMaxQuantization._set_backend_entity": _MIN_MAX,
    "wrap_model": _HOOKS,
    "get_hook_storage": _HOOKS,
    "decode_hook_name": f"{_HOOKS}.hook_storage",
    "GraphModelWrapper": f"{_HOOKS}.nncf_graph.nncf_graph_builder",
    "get_const_node": "nncf.torch.model_graph_manager",
    "get_weight_tensor_port_ids": "nncf.torch.model_graph_manager",
    "BaseQuantizer": "nncf.torch.quantization.layers",
    "AsymmetricQuantizer": "nncf.torch.quantization.layers",
    "DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT": "nncf.torch.quantization.default_quantization",
    "QuantizationTrait": f"{_STRUCTS}.quantizer_propagation.structs",
    "QuantizerPropagationRule": f"{_STRUCTS}.quantizer_propagation.structs",
    "QuantizationScheme": f"{_STRUCTS}.structs",
    "QuantizerConfig": f"{_STRUCTS}.structs",
    "SingleConfigQuantizationPoint": f"{_STRUCTS}.quantizer_setup",
    "ActivationQuantizationInsertionPoint": f"{_STRUCTS}.quantizer_setup",
    "WeightQuantizationInsertionPoint": f"{_STRUCTS}.quantizer_setup",
    "OverflowFix": "nncf.quantization.advanced_parameters",
    "AdvancedSmoothQuantParameters": "nncf.quantization.advanced_parameters",
    "RangeEstimatorParametersSet": "nncf.quantization.range_estimator",
    "AdvancedQuantizationParameters": "nncf.quantization.advanced_parameters",
    "track": "nncf.common.logging.track_progress",
}


@functools.cache
def _private() -> dict[str, Any]:
    """The private names, found and checked once; raises `AdapterError` and `MissingExtraError`."""
    nncf = require("nncf", "nncf")
    version = nncf.__version__
    numbers = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if not SUPPORTED[0] <= numbers < SUPPORTED[1]:
        raise AdapterError(
            f"NNCF {version} is installed; this adapter works with 3.0 up to, not including, 4 (tested: {TESTED}). "
            "Install one of these: pip install 'nncf>=3.0,<4'."
        )
    found, missing = {}, []
    for name, module in _NAMES.items():
        try:
            found[name] = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            missing.append(f"{module}.{name}")
    if missing:
        raise AdapterError(
            f"NNCF {version} has no {', '.join(missing)}, which this adapter builds on (tested with NNCF {TESTED}). "
            f"Install the tested version: pip install 'nncf=={TESTED}.*'."
        )
    return found


# --- the traced graph -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightedOp:
    """An operation that reads a constant: `parameter` is its name in the state dict, `port` where it enters."""

    name: str
    parameter: str
    port: int


@dataclass(frozen=True)
class Graph:
    """What NNCF's trace of a model says: the weighted operations, and every operation it might quantize."""

    weighted: tuple[WeightedOp, ...]
    quantizable: tuple[str, ...]
    nncf_graph: Any
    wrapper: Any


def trace(model: nn.Module, example: Any) -> Graph:
    """Trace `model` (wrapped in place for NNCF's hooks) on an example in evaluation mode."""
    private = _private()
    wrapper = private["GraphModelWrapper"](private["wrap_model"](model), example)
    graph = wrapper.build_graph()
    weighted = []
    quantizable_types = set(private["DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT"][private["QuantizationTrait"].INPUTS_QUANTIZABLE])
    quantizable = []
    for node in graph.get_all_nodes():
        ports = private["get_weight_tensor_port_ids"](node, graph) if getattr(node.metatype, "weight_port_ids", None) else ()
        if node.metatype in quantizable_types or ports:
            quantizable.append(node.node_name)
        for port in ports:
            constant = private["get_const_node"](node, port, graph)
            if constant is not None:
                weighted.append(WeightedOp(node.node_name, constant.layer_attributes.name, port))
    return Graph(tuple(weighted), tuple(quantizable), graph, wrapper)


def input_names(graph: Graph) -> list[str]:
    """The names of the model's inputs, in order."""
    return [node.node_name for node in graph.nncf_graph.get_input_nodes()]


# --- the quantizer setup ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One planned quantizer: where it stands, the operations that read it, and the group that must share its scale.

    It stands before input `port` of the operation `target`, or after `target` when `port` is None.
    """

    key: int
    is_weight: bool
    target: str
    port: int | None
    operations: tuple[str, ...]
    unified: int | None


def points(setup: Any) -> tuple[Point, ...]:
    """The quantizers that NNCF plans."""
    unified = {key: group for group, keys in setup.unified_scale_groups.items() for key in keys}
    return tuple(
        Point(
            key,
            point.is_weight_quantization_point(),
            point.insertion_point.target_node_name,
            getattr(point.insertion_point, "input_port_id", None),
            (point.insertion_point.target_node_name,)
            if point.is_weight_quantization_point()
            else tuple(point.directly_quantized_operator_node_names),
            unified.get(key),
        )
        for key, point in setup.quantization_points.items()
    )


def set_point_bits(setup: Any, point: Point, bits: int) -> None:
    """Plan `bits` for one quantizer; weights use their full range of codes."""
    config = setup.quantization_points[point.key].qconfig
    config.num_bits = bits
    if point.is_weight:
        # A narrow range (2^b - 1 levels) is exported with 2^b levels and then disagrees with torch after training.
        config.narrow_range = False


def add_weight_point(setup: Any, operation: str, bits: int) -> None:
    """Plan a symmetric per-channel weight quantizer where NNCF planned none."""
    private = _private()
    config = private["QuantizerConfig"](bits, private["QuantizationScheme"].SYMMETRIC, True, True, False)
    place = private["WeightQuantizationInsertionPoint"](operation)
    setup.add_independent_quantization_point(private["SingleConfigQuantizationPoint"](place, config, [operation]))


def add_activation_point(setup: Any, operation: str, bits: int) -> None:
    """Plan a private symmetric per-tensor quantizer on the input of an operation that NNCF would leave in float."""
    private = _private()
    config = private["QuantizerConfig"](bits, private["QuantizationScheme"].SYMMETRIC, None, False, False)
    place = private["ActivationQuantizationInsertionPoint"](operation, 0)
    setup.add_independent_quantization_point(private["SingleConfigQuantizationPoint"](place, config, [operation]))


def drop_point(setup: Any, point: Point) -> None:
    """Plan no quantizer there."""
    del setup.quantization_points[point.key]
    for groups in (setup.unified_scale_groups, setup.shared_input_operation_set_groups):
        for key in [key for key, members in groups.items() if point.key in members]:
            groups[key].discard(point.key)
            if not groups[key]:
                del groups[key]


def propagation_rule(*, merge_branches: bool) -> Any:
    """NNCF's rule for a tensor with several readers: one quantizer for all, or one for each."""
    rule = _private()["QuantizerPropagationRule"]
    return rule.MERGE_ALL_IN_ONE if merge_branches else rule.DO_NOT_MERGE_BRANCHES


def plan(graph: Graph, *, merge_branches: bool, ignored: tuple[str, ...], asymmetric: bool) -> Any:
    """The quantizer setup NNCF would use, without calibrating anything."""
    nncf, private = require("nncf", "nncf"), _private()
    algorithm = private["MinMaxQuantization"](
        preset=_preset(asymmetric=asymmetric),
        ignored_scope=nncf.IgnoredScope(names=list(ignored), validate=False),
        overflow_fix=private["OverflowFix"].DISABLE,
        quantizer_propagation_rule=propagation_rule(merge_branches=merge_branches),
    )
    algorithm._set_backend_entity(graph.wrapper)
    return algorithm.find_quantization_setup(graph.wrapper, graph.nncf_graph)


def _preset(*, asymmetric: bool) -> Any:
    preset = require("nncf", "nncf").QuantizationPreset
    return preset.MIXED if asymmetric else preset.PERFORMANCE


@contextlib.contextmanager
def edited_quantization(on_setup: Callable[[Any], None], on_placed: Callable[[nn.Module], None]) -> Iterator[None]:
    """Let `on_setup` edit the quantizer setup, and `on_placed` the module before bias correction sees it.

    NNCF's progress bars stay silent. Patches classes, hence not for several threads at once (neither is NNCF).
    """
    algorithm, track = _private()["MinMaxQuantization"], _private()["track"]
    find, apply, show = algorithm.find_quantization_setup, algorithm.apply, track.__init__

    def find_and_edit(self: Any, model: Any, graph: Any) -> Any:
        setup = find(self, model, graph)
        on_setup(setup)
        return setup

    def apply_and_edit(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        placed = apply(self, model, *args, **kwargs)
        on_placed(placed.model)
        return placed

    def show_nothing(self: Any, *args: Any, **kwargs: Any) -> None:
        show(self, *args, **{**kwargs, "disable": True})

    algorithm.find_quantization_setup, algorithm.apply, track.__init__ = find_and_edit, apply_and_edit, show_nothing
    try:
        yield
    finally:
        algorithm.find_quantization_setup, algorithm.apply, track.__init__ = find, apply, show


def quantize(
    model: nn.Module,
    inputs: list[Any],
    *,
    ignored: tuple[str, ...],
    merge_branches: bool,
    asymmetric: bool,
    batchwise: bool,
    bias_correction: bool,
    smooth: bool,
    activation_range: str,
) -> nn.Module:
    """The public `nncf.quantize` on all `inputs`, as this adapter always calls it.

    NNCF estimates activation ranges by its default for any `activation_range` but "max" and "percentile"; `smooth` lets
    SmoothQuant move ranges from activations into linear layers.
    """
    nncf, private = require("nncf", "nncf"), _private()
    module: nn.Module = nncf.quantize(
        model,
        nncf.Dataset(inputs),
        subset_size=len(inputs),
        preset=_preset(asymmetric=asymmetric),
        ignored_scope=nncf.IgnoredScope(names=list(ignored), validate=False),
        advanced_parameters=private["AdvancedQuantizationParameters"](
            overflow_fix=private["OverflowFix"].DISABLE,  # its doubled first-layer scale is wrong below 8 bits
            batchwise_statistics=batchwise,
            disable_bias_correction=not bias_correction,
            quantizer_propagation_rule=propagation_rule(merge_branches=merge_branches),
            activations_range_estimator_params=_estimator(activation_range),
        ),
        # NNCF runs SmoothQuant for this type only, by default on linear layers; the preset is ours all the same.
        model_type=nncf.ModelType.TRANSFORMER if smooth else None,
    )
    return module


def _estimator(activation_range: str) -> Any:
    name = {"max": "MINMAX", "percentile": "MEAN_QUANTILE"}.get(activation_range)
    return None if name is None else getattr(_private()["RangeEstimatorParametersSet"], name)


# --- the placed quantizers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hook:
    """A placed quantizer: `name` in the hook storage, and the operation and port it stands before (or after)."""

    name: str
    operation: str
    port: int
    before: bool


def hooks(module: nn.Module) -> tuple[Hook, ...]:
    """All quantizers of a module, a shared one once per place."""
    private = _private()
    found = []
    for name, quantizer in private["get_hook_storage"](module).named_hooks(remove_duplicate=False):
        if isinstance(quantizer, private["BaseQuantizer"]):
            kind, operation, port = private["decode_hook_name"](name)
            found.append(Hook(name, operation, port, kind == "pre_hooks"))
    return tuple(found)


def quantizer_at(module: nn.Module, hook_name: str) -> nn.Module:
    """The quantizer that stands at a place."""
    quantizer: nn.Module = _private()["get_hook_storage"](module).get_submodule(hook_name)
    return quantizer


def replace_quantizer(module: nn.Module, hook_name: str, quantizer: nn.Module) -> None:
    """Put another module at the place of a quantizer."""
    storage = _private()["get_hook_storage"](module)
    place, _, key = hook_name.rpartition(".")
    storage.get_submodule(place)[key] = quantizer


def is_quantized(module: nn.Module) -> bool:
    """Whether the module carries NNCF's hooks."""
    return hasattr(module, "__nncf_hooks")


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


def set_weight_step(quantizer: Any, step: Any) -> None:
    """Give a symmetric weight quantizer the step between two codes."""
    quantizer.scale.data.copy_((step * quantizer.level_high).reshape(quantizer.scale.shape))


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
    asymmetric = isinstance(quantizer, _private()["AsymmetricQuantizer"])
    return ActivationKind(asymmetric, asymmetric or quantizer.signed, quantizer.level_low, quantizer.level_high)


def channels_of(quantizer: Any) -> int:
    """How many ranges an activation quantizer has: one, or one per channel."""
    return int(math.prod(quantizer.scale_shape))


def set_activation_range(quantizer: Any, low: Any, high: Any) -> None:
    """Give an activation quantizer its lowest and highest values, one each or one per channel."""
    if isinstance(quantizer, _private()["AsymmetricQuantizer"]):
        quantizer.input_low.data.copy_(low.reshape(quantizer.input_low.shape))
        quantizer.input_range.data.copy_((high - low).reshape(quantizer.input_range.shape))
    else:
        quantizer.scale.data.copy_(high.reshape(quantizer.scale.shape))


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


def activation_grid(quantizer: Any) -> Grid:
    """The grid of an activation quantizer; codes of unsigned and asymmetric ones start at 0, signed ones are symmetric."""
    import torch

    low, high = (value.detach() for value in quantizer.get_input_low_input_high())
    step = (high - low) / (quantizer.levels - 1)
    if isinstance(quantizer, _private()["AsymmetricQuantizer"]):
        return Grid(step, torch.round(-low / step), 0, quantizer.levels - 1)
    return Grid(step, torch.zeros_like(step), quantizer.level_low, quantizer.level_high)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def placement(module: nn.Module) -> dict[str, Any]:
    """NNCF's description of where which quantizer stands, as plain JSON values."""
    described: dict[str, Any] = json.loads(json.dumps(importlib.import_module("nncf.torch").get_config(module)))
    return described


def place(model: nn.Module, description: dict[str, Any]) -> nn.Module:
    """Put quantizers as described onto `model`, in place."""
    scheme = _private()["QuantizationScheme"]
    for command in description["compression_state"]:
        config = command["module_config"]
        if "mode" in config:  # SmoothQuant's multiplications have none
            config["mode"] = scheme(config["mode"])
        config["scale_shape"] = tuple(config["scale_shape"])
    module: nn.Module = importlib.import_module("nncf.torch").load_from_config(model, description)
    return module
