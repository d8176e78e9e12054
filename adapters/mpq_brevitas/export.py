"""A quantized module -> QONNX or ONNX QCDQ."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.duq import fold_duq
from mpq_brevitas.float_weights import check_quantized_weights
from mpq_brevitas.modules import get_layer
from mpq_brevitas.onnx_graph import FORMAT, LAYER_OPS, METADATA, OnnxGraph, call_name
from mpq_brevitas.quant_nodes import read_quantizer
from mpq_brevitas.recipe import Recipe, recipe_of
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.adapter.spelled import Spelled
from mpq_plugins.common.files import disk_refusal, write_whole
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.parametrized import without_parametrizations
from mpq_plugins.model.run import batch_size, call, device_of, evaluating, tensors, to_device
from mpq_plugins.space.bits import BitConfig

# FINN's passes know opset 13; attention and layer normalisation need a later one.
_OPSETS = {"finn": 13, "layerwise": 17}
_WRAPPED = "model"


def export(module: nn.Module, path: str | Path, example: Any, *, format: str) -> Path:
    """Write `module`, of one image in the finn profile and any number in the other; nodes of layers get the layers' names."""
    bits, recipe = bits_of(check_quantized_weights(module)), recipe_of(module)
    binary = [name for name, precision in bits.layers.items() if precision.weight == 1]
    if format == "qcdq" and binary:
        raise AdapterError(f"ONNX QCDQ has no binary weights ({', '.join(binary)}). Export qonnx, or give them 2 bits.")
    for package in ("onnx", "onnxoptimizer"):
        require(package, "brevitas")
    example = one_image(to_device(example, device_of(module)))
    keys, args = _arguments(example)
    calls = _call_order(module, bits, example)
    metadata = {
        "format": FORMAT,
        "adapter": "brevitas",
        "profile": recipe.profile,
        "fingerprint": bits.fingerprint,
        "layers": {
            name: {**precision.to_json(), "weight_shape": list(get_layer(module, name).weight.shape)}
            for name, precision in bits.layers.items()
        },
    }

    def write(temporary: Path) -> None:
        wrapped = _Positional(_deployable(module, recipe), keys).eval()
        # FINN's passes need every size; everything else takes any number of images.
        _write_raw(wrapped, temporary, args, format, _OPSETS[recipe.profile], free_batch=recipe.profile != "finn")
        _finish(temporary, calls, metadata)

    return write_whole(path, write)


def _deployable(module: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy with quantizers of one scale each, which is all that ONNX has, and without limits that change nothing."""
    copied = without_parametrizations(copy.deepcopy(module).eval())
    brevitas.drop_needless_limits(copied)
    return fold_duq(copied) if recipe.quantizer == "duq" else copied


def one_image(example: Any) -> Any:
    """The first image of an example: every tensor that has the batch axis is cut to length one."""
    n_images = batch_size(example)

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[:1] if value.dim() and value.shape[0] == n_images else value
        if isinstance(value, Mapping):
            return {key: cut(item) for key, item in value.items()}
        return tuple(cut(item) for item in value) if isinstance(value, (tuple, list)) else value

    return cut(example)


def _call_order(module: nn.Module, bits: BitConfig, example: Any) -> list[str]:
    """Layer names in the order of their calls."""
    order: list[str] = []
    handles = [
        get_layer(module, name).register_forward_hook(lambda _module, _inputs, _output, name=name: order.append(name))
        for name in bits.layers
    ]
    try:
        with evaluating(module), brevitas.guarded():
            call(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return order


class _Positional(nn.Module):
    """A module that takes its inputs by position and returns a tuple of tensors: what the ONNX exporter can trace."""

    def __init__(self, module: nn.Module, keys: tuple[str, ...] | None) -> None:
        super().__init__()
        setattr(self, _WRAPPED, module)
        self.keys = keys

    def forward(self, *args: Any) -> tuple[Tensor, ...]:
        module = getattr(self, _WRAPPED)
        result = module(*args) if self.keys is None else module(**dict(zip(self.keys, args, strict=True)))
        return tuple(brevitas.plain(tensor) for tensor in tensors(brevitas.plain(result)))


def _write_raw(module: _Positional, path: Path, args: tuple[Tensor, ...], format: str, opset: int, *, free_batch: bool) -> None:
    """Brevitas' own export. It leaves handlers and caches in the module, which must be a copy."""
    from brevitas.export import export_onnx_qcdq, export_qonnx

    names = list(module.keys or [f"input_{index}" if len(args) > 1 else "input" for index in range(len(args))])
    images = {name for name, value in zip(names, args, strict=True) if value.dim() and value.shape[0] == 1}
    free = {"dynamic_axes": {name: {0: "batch"} for name in images}} if free_batch else {}
    write = {"qonnx": export_qonnx, "qcdq": export_onnx_qcdq}[format]
    with brevitas.guarded(), _plain_attention(), Spelled():
        try:
            # dynamo=False: the newer exporter renames and merges initializers, and fails on attention.
            write(module, args=args, export_path=str(path), dynamo=False, opset_version=opset, input_names=names, **free)
        except Exception as error:
            if disk_refusal(error) is not None:
                raise  # `write_whole` tells it
            raise AdapterError(
                f"Brevitas could not export the module as {format}: {type(error).__name__}: {_first_line(error)}. "
                "Check that its forward pass uses operations that ONNX has."
            ) from error


def _first_line(error: Exception) -> str:
    # torch appends the whole traced graph to its message.
    return next(iter(str(error).splitlines()), "")


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Have MultiheadAttention compute with ordinary operations: its fused one has no ONNX counterpart."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _arguments(example: Any) -> tuple[tuple[str, ...] | None, tuple[Tensor, ...]]:
    keys = tuple(example) if isinstance(example, Mapping) else None
    values = tuple(example.values()) if isinstance(example, Mapping) else example
    args = tuple(values) if isinstance(values, (tuple, list)) else (values,)
    if not all(isinstance(value, Tensor) for value in args):
        kinds = ", ".join(type(value).__name__ for value in args)
        raise AdapterError(f"export takes a tensor, a tuple of tensors or a dict of tensors as example, not ({kinds}).")
    return keys, args


def _finish(path: Path, calls: list[str], metadata: Mapping[str, Any]) -> None:
    """Name the nodes of layers, drop the wrapper's name, and attach the metadata."""
    import onnx

    model = OnnxGraph.load(path).model
    _unwrap_names(model)
    _initializers_are_no_inputs(model)
    _explicit_padding(model)
    _name_layers(OnnxGraph(model, path), calls)
    onnx.helper.set_model_props(model, {METADATA: json.dumps(metadata, sort_keys=True)})
    onnx.save(model, str(path))


def _unwrap_names(model: Any) -> None:
    prefix = f"{_WRAPPED}."
    renamed = {tensor.name: tensor.name.removeprefix(prefix) for tensor in model.graph.initializer}
    for item in (*model.graph.initializer, *model.graph.input):
        item.name = renamed.get(item.name, item.name)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def _initializers_are_no_inputs(model: Any) -> None:
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [item for item in model.graph.input if item.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _explicit_padding(model: Any) -> None:
    """Spell padding="same" in numbers: onnxruntime has no automatic padding of dilated convolutions."""
    import onnx

    for node in model.graph.node:
        found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type != "Conv" or found.get("auto_pad") != b"SAME_UPPER" or "kernel_shape" not in found:
            continue
        kernel = found["kernel_shape"]  # torch has "same" for a stride of one only
        totals = [step * (size - 1) for step, size in zip(found.get("dilations", [1] * len(kernel)), kernel, strict=True)]
        kept = [item for item in node.attribute if item.name not in ("auto_pad", "pads")]
        pads = [total // 2 for total in totals] + [total - total // 2 for total in totals]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("pads", pads)])


def _name_layers(graph: OnnxGraph, calls: list[str]) -> None:
    nodes = [node for node in graph.model.graph.node if node.op_type in LAYER_OPS and _reads_weight(graph, node)]
    if len(nodes) != len(calls):
        raise AdapterError(
            f"the exported graph has {len(nodes)} quantized layer calls, the module made {len(calls)}. "
            "Its forward pass must not depend on the data, and every call must reach an output: exclude layers whose output is "
            "not used."
        )
    seen: dict[str, int] = {}
    known = frozenset(calls)
    for node, name in zip(nodes, calls, strict=True):
        seen[name] = seen.get(name, 0) + 1
        node.name = call_name(name, seen[name], known)


def _reads_weight(graph: OnnxGraph, node: Any) -> bool:
    quantizer = read_quantizer(graph, node.input[1])
    return quantizer is not None and graph.constant(quantizer.source) is not None
