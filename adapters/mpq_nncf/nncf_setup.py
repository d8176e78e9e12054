"""What NNCF plans: its trace of a model, and the quantizer setup that it computes on the way to a quantized module.

NNCF's own quantizer placement, calibration and bias correction run unchanged inside the public `nncf.quantize`; what is
edited is the setup (`MinMaxQuantization.find_quantization_setup`) and the quantizers right after they are placed (`.apply`).
"""

from __future__ import annotations

import contextlib
import copyreg
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpq_nncf.internals import private
from mpq_nncf.options import NNCFOptions
from mpq_plugins.common.plugins import require

_KIND = type(torch.Tensor.mT)


@contextlib.contextmanager
def copyable_accessors() -> Iterator[None]:
    """Let `copy.deepcopy` take accessors by name, as it takes functions; NNCF keeps them in the graphs that it copies."""
    before = copyreg.dispatch_table.get(_KIND)
    copyreg.dispatch_table[_KIND] = _by_name
    try:
        yield
    finally:
        copyreg.dispatch_table.pop(_KIND)
        if before is not None:
            copyreg.dispatch_table[_KIND] = before


def _by_name(accessor: Any) -> tuple[Any, tuple[Any, str]]:
    return getattr, (accessor.__objclass__, accessor.__name__)


class _Chain(nn.Module):
    """The children of an `nn.Sequential` under their own names, without its iteration over every child."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self._order = tuple(chain._modules)
        for name, child in chain._modules.items():
            self.add_module(name, child)
        self.train(chain.training)

    def forward(self, input: Any) -> Any:  # the name by which a Sequential may be called
        value = input
        for name in self._order:
            value = self._modules[name](value)  # type: ignore[misc]  # children of a Sequential are modules
        return value


def as_hookable(model: nn.Module) -> nn.Module:
    """`model` itself, or for a top-level `nn.Sequential` a module with the same children, names and result.

    NNCF stores its hooks as one more child, and a Sequential would call that child.
    """
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        return _Chain(model)
    return model


@dataclass(frozen=True)
class WeightedOp:
    """An operation that reads a constant: `parameter` is its name in the state dict, `port` where it enters."""

    name: str
    parameter: str
    port: int


@dataclass(frozen=True)
class TracedGraph:
    """What NNCF's trace of a model says: the weighted operations, and every operation it might quantize."""

    weighted: tuple[WeightedOp, ...]
    quantizable: tuple[str, ...]
    nncf_graph: Any
    wrapper: Any


def trace(model: nn.Module, example: Any) -> TracedGraph:
    """Trace `model` (wrapped in place for NNCF's hooks) on an example in evaluation mode."""
    names = private()
    wrapper = names["GraphModelWrapper"](names["wrap_model"](model), example)
    graph = wrapper.build_graph()
    weighted = []
    quantizable_types = set(names["DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT"][names["QuantizationTrait"].INPUTS_QUANTIZABLE])
    quantizable = []
    for node in graph.get_all_nodes():
        ports = names["get_weight_tensor_port_ids"](node, graph) if getattr(node.metatype, "weight_port_ids", None) else ()
        if node.metatype in quantizable_types or ports:
            quantizable.append(node.node_name)
        for port in ports:
            constant = names["get_const_node"](node, port, graph)
            if constant is not None:
                weighted.append(WeightedOp(node.node_name, constant.layer_attributes.name, port))
    return TracedGraph(tuple(weighted), tuple(quantizable), graph, wrapper)


def fed(graph: TracedGraph) -> frozenset[str]:
    """The operations that something on the way from the model's inputs reaches; the others give every image the same."""
    waiting, found = list(graph.nncf_graph.get_input_nodes()), set()
    while waiting:
        node = waiting.pop()
        if node.node_name not in found:
            found.add(node.node_name)
            waiting += graph.nncf_graph.get_next_nodes(node)
    return frozenset(found)


def input_names(graph: TracedGraph) -> list[str]:
    """The names of the model's inputs, in order."""
    return [node.node_name for node in graph.nncf_graph.get_input_nodes()]


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
    names = private()
    config = names["QuantizerConfig"](bits, names["QuantizationScheme"].SYMMETRIC, True, True, False)
    place = names["WeightQuantizationInsertionPoint"](operation)
    setup.add_independent_quantization_point(names["SingleConfigQuantizationPoint"](place, config, [operation]))


def add_activation_point(setup: Any, operation: str, bits: int) -> None:
    """Plan a private symmetric per-tensor quantizer on the input of an operation that NNCF would leave in float."""
    names = private()
    config = names["QuantizerConfig"](bits, names["QuantizationScheme"].SYMMETRIC, None, False, False)
    place = names["ActivationQuantizationInsertionPoint"](operation, 0)
    setup.add_independent_quantization_point(names["SingleConfigQuantizationPoint"](place, config, [operation]))


def drop_point(setup: Any, point: Point) -> None:
    """Plan no quantizer there."""
    del setup.quantization_points[point.key]
    for groups in (setup.unified_scale_groups, setup.shared_input_operation_set_groups):
        for key in [key for key, members in groups.items() if point.key in members]:
            groups[key].discard(point.key)
            if not groups[key]:
                del groups[key]


@copyable_accessors()
def plan(graph: TracedGraph, options: NNCFOptions, *, ignored: tuple[str, ...]) -> Any:
    """The quantizer setup NNCF would use, without calibrating anything."""
    nncf, names = require("nncf", "nncf"), private()
    algorithm = names["MinMaxQuantization"](
        preset=_preset(options),
        ignored_scope=nncf.IgnoredScope(names=list(ignored), validate=False),
        overflow_fix=names["OverflowFix"].DISABLE,
        quantizer_propagation_rule=_propagation_rule(options),
    )
    algorithm._set_backend_entity(graph.wrapper)
    return algorithm.find_quantization_setup(graph.wrapper, graph.nncf_graph)


def _preset(options: NNCFOptions) -> Any:
    preset = require("nncf", "nncf").QuantizationPreset
    return preset.MIXED if options.asymmetric else preset.PERFORMANCE


def _propagation_rule(options: NNCFOptions) -> Any:
    """NNCF's rule for a tensor with several readers: one quantizer for all, or one for each."""
    rule = private()["QuantizerPropagationRule"]
    return rule.MERGE_ALL_IN_ONE if options.merge_branches else rule.DO_NOT_MERGE_BRANCHES


@contextlib.contextmanager
def edited_quantization(
    on_setup: Callable[[Any], None], on_placed: Callable[[nn.Module], None], *, plan: Any = None
) -> Iterator[None]:
    """Let `on_setup` edit the quantizer setup, and `on_placed` the module before bias correction sees it.

    With a `plan` of the same network, which is then edited, NNCF does not search for the patterns in its graph again.
    NNCF's progress bars stay silent. Patches classes, hence not for several threads at once (neither is NNCF).
    """
    algorithm, track = private()["MinMaxQuantization"], private()["track"]
    find, apply, show = algorithm.find_quantization_setup, algorithm.apply, track.__init__

    def find_and_edit(self: Any, model: Any, graph: Any) -> Any:
        setup = find(self, model, graph) if plan is None else plan
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


@copyable_accessors()
def quantize(
    model: nn.Module,
    inputs: list[Any],
    options: NNCFOptions,
    *,
    ignored: tuple[str, ...],
    batchwise: bool,
    smooth: bool,
) -> nn.Module:
    """The public `nncf.quantize` on all `inputs`, as this adapter always calls it.

    `smooth` lets SmoothQuant move ranges from activations into linear layers. Biases are not corrected: see `repairs`.
    """
    nncf, names = require("nncf", "nncf"), private()
    module: nn.Module = nncf.quantize(
        model,
        nncf.Dataset(inputs),
        subset_size=len(inputs),
        preset=_preset(options),
        ignored_scope=nncf.IgnoredScope(names=list(ignored), validate=False),
        advanced_parameters=names["AdvancedQuantizationParameters"](
            overflow_fix=names["OverflowFix"].DISABLE,  # its doubled first-layer scale is wrong below 8 bits
            batchwise_statistics=batchwise,
            disable_bias_correction=True,
            quantizer_propagation_rule=_propagation_rule(options),
        ),
        # NNCF runs SmoothQuant for this type only, by default on linear layers; the preset is ours all the same.
        model_type=nncf.ModelType.TRANSFORMER if smooth else None,
    )
    return module
