"""A quantized module -> QONNX or ONNX QCDQ."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpq_brevitas import internals as brevitas
from mpq_brevitas.codes import check_quantized_weights
from mpq_brevitas.duq import fold_duq
from mpq_brevitas.options import BrevitasOptions, Profile, options_of
from mpq_brevitas.read import FORMAT, LAYER_OPS, METADATA, BrevitasGraph, call_name, read_quantizer
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.adapter.hooks import call_order
from mpq_plugins.adapter.positional import Positional, positional
from mpq_plugins.adapter.spelled import Spelled
from mpq_plugins.adapter.stages import told
from mpq_plugins.common.files import disk_refusal, write_whole
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.parametrized import without_parametrizations
from mpq_plugins.model.run import Batch, device_of, evaluating, to_device

# FINN's passes know opset 13; attention and layer normalisation need a later one.
_OPSETS = {"finn": 13, "layerwise": 17}
_WRAPPED = "module"  # what `positional` calls it


def export(module: nn.Module, path: str | Path, example: Any, *, format: str) -> Path:
    """Write `module`, of one image in the finn profile and any number in the other; nodes of layers get the layers' names."""
    bits, options = bits_of(check_quantized_weights(module)), options_of(module)
    binary = [name for name, precision in bits.layers.items() if precision.weight == 1]
    if format == "qcdq" and binary:
        raise AdapterError(f"ONNX QCDQ has no binary weights ({', '.join(binary)}). Export qonnx, or give them 2 bits.")
    for package in ("onnx", "onnxoptimizer"):
        require(package, "brevitas")
    example = Batch(to_device(example, device_of(module))).part(0, 1).inputs
    wrapped, args, _ = positional(_deployable(module, options), example, plain=brevitas.plain)
    with brevitas.guarded():
        calls = call_order(module, bits.layers, example)
    metadata = {
        "format": FORMAT,
        "adapter": "brevitas",
        "profile": options.profile,
        "fingerprint": bits.fingerprint,
        "layers": {
            name: {**precision.to_json(), "weight_shape": list(module.get_submodule(name).weight.shape)}
            for name, precision in bits.layers.items()
        },
    }

    def write(temporary: Path) -> None:
        _write_raw(wrapped, args, temporary, format, options.profile)
        _finish(temporary, calls, metadata)

    return write_whole(path, write)


def _deployable(module: nn.Module, options: BrevitasOptions) -> nn.Module:
    """A copy with quantizers of one scale each, which is all that ONNX has, and without limits that change nothing."""
    copied = without_parametrizations(copy.deepcopy(module).eval())
    brevitas.drop_needless_limits(copied)
    return fold_duq(copied) if options.quantizer == "duq" else copied


def _write_raw(wrapped: Positional, args: tuple[Tensor, ...], path: Path, format: str, profile: Profile) -> None:
    """Brevitas' own export. It leaves handlers and caches in the module, which must be a copy."""
    from brevitas.export import export_onnx_qcdq, export_qonnx

    names = list(wrapped.keys or [f"input_{index}" if len(args) > 1 else "input" for index in range(len(args))])
    images = {name for name, value in zip(names, args, strict=True) if value.dim() and value.shape[0] == 1}
    # FINN's passes need every size; everything else takes any number of images.
    free = {} if profile == "finn" else {"dynamic_axes": {name: {0: "batch"} for name in images}}
    opset = _OPSETS[profile]
    write = {"qonnx": export_qonnx, "qcdq": export_onnx_qcdq}[format]
    with brevitas.guarded(), evaluating(wrapped), Spelled():
        try:
            # dynamo=False: the newer exporter renames and merges initializers, and fails on attention.
            write(wrapped, args=args, export_path=str(path), dynamo=False, opset_version=opset, input_names=names, **free)
        except Exception as error:
            if disk_refusal(error) is not None:
                raise  # `write_whole` tells it
            raise AdapterError(
                f"Brevitas could not export the module as {format}: {told(error)}. "
                "Check that its forward pass uses operations that ONNX has."
            ) from error


def _finish(path: Path, calls: list[str], metadata: Mapping[str, Any]) -> None:
    """Name the nodes of layers, drop the wrapper's name, and attach the metadata."""
    import onnx

    model = BrevitasGraph.load(path).model
    _unwrap_names(model)
    _initializers_are_no_inputs(model)
    _explicit_padding(model)
    _name_layers(BrevitasGraph(model, path), calls)
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


def _name_layers(graph: BrevitasGraph, calls: list[str]) -> None:
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


def _reads_weight(graph: BrevitasGraph, node: Any) -> bool:
    quantizer = read_quantizer(graph, node.input[1])
    return quantizer is not None and graph.constant(quantizer.source) is not None
