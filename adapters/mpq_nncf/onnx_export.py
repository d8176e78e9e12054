"""ONNX that onnxruntime runs: weights as int8 codes, activations as QuantizeLinear, Clip, DequantizeLinear.

The exporter meets placeholders of our own (domain `mpq`) instead of NNCF's quantizers; they carry the layer's name, codes and
grid through the export and are then replaced by standard operators, so nothing has to be recognised afterwards.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.codes import layer_codes, quantized_weight
from mpq_nncf.declaration import CALL, KEY, WEIGHT, Declaration
from mpq_nncf.internals import quiet
from mpq_nncf.wiring import LayerWiring, wiring_of
from mpq_plugins.adapter.positional import positional
from mpq_plugins.adapter.spelled import Spelled
from mpq_plugins.common.files import write_whole
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import AdapterError

_OPSET = 17
_DOMAIN = "mpq"


@dataclass(frozen=True)
class _WeightFacts:
    layer: str
    codes: Tensor
    scale: Tensor
    axis: int


class _WeightFunction(torch.autograd.Function):
    # The facts travel as one object: tensors among the arguments would become nodes of the traced graph.
    @staticmethod
    def symbolic(g: Any, weight: Any, facts: _WeightFacts) -> Any:
        node = g.op(f"{_DOMAIN}::Weight", codes_t=facts.codes, scale_t=facts.scale, layer_s=facts.layer, axis_i=facts.axis)
        node.setType(weight.type())
        return node

    @staticmethod
    def forward(ctx: Any, weight: Tensor, facts: _WeightFacts) -> Tensor:
        return weight.clone()


class _ActivationFunction(torch.autograd.Function):
    @staticmethod
    def symbolic(g: Any, value: Any, grid: nncf_quantizers.Grid) -> Any:
        node = g.op(
            f"{_DOMAIN}::Activation",
            value,
            scale_t=grid.step,
            zero_point_t=grid.zero_point,
            low_i=grid.low,
            high_i=grid.high,
        )
        node.setType(value.type())
        return node

    @staticmethod
    def forward(ctx: Any, value: Tensor, grid: nncf_quantizers.Grid) -> Tensor:
        return value.clone()


class _Placeholder(nn.Module):
    def __init__(self, function: type[torch.autograd.Function], facts: _WeightFacts | nncf_quantizers.Grid) -> None:
        super().__init__()
        self._function, self._facts = function, facts

    def forward(self, value: Tensor) -> Tensor:
        result: Tensor = self._function.apply(value, self._facts)
        return result


def export_onnx(module: nn.Module, path: Path, example: Any, declaration: Declaration, *, packed: bool) -> Path:
    """Write `path`; `module` is a copy that may be changed. `packed` stores weights of 2 to 4 bits in ONNX's types for them."""
    onnx = require("onnx", "onnx")
    _put_placeholders(module)
    wrapped, values, names = positional(module, example)
    with torch.no_grad():
        n_outputs = len(wrapped(*values))
    outputs = tuple(f"output_{index}" for index in range(n_outputs)) if n_outputs > 1 else ("output",)
    buffer = io.BytesIO()
    with quiet(), _explained(), Spelled():
        torch.onnx.export(
            wrapped,
            values,
            buffer,
            dynamo=False,  # the other exporter cannot trace NNCF's hooks
            opset_version=_OPSET,
            input_names=list(names),
            output_names=list(outputs),
            dynamic_axes={name: {0: "batch"} for name in (*names, *outputs)},
            custom_opsets={_DOMAIN: 1},
        )
    model = onnx.load_from_string(buffer.getvalue())
    _expand(model, declaration)
    if packed:
        from mpq_nncf.onnx_packing import pack_weights

        model = pack_weights(model, declaration)
    model.metadata_props.add(key=KEY, value=declaration.dumps())
    onnx.checker.check_model(model)
    return write_whole(path, lambda temporary: onnx.save(model, temporary))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # base of the exporter's errors
        reason = str(error).strip().splitlines()[0][:300]
        raise AdapterError(f"torch cannot write this model as ONNX: {reason} Export to openvino-compact instead.") from error


def _put_placeholders(module: nn.Module) -> None:
    wiring = wiring_of(module)
    weights = {hook: (name, layer) for name, layer in wiring.items() for hook in layer.weight}
    made = {hook: _weight_placeholder(module, name, layer) for hook, (name, layer) in weights.items()}
    for hook in nncf_quantizers.hooks(module):
        if hook.name not in made:
            grid = nncf_quantizers.activation_grid(nncf_quantizers.quantizer_at(module, hook.name))
            made[hook.name] = _Placeholder(_ActivationFunction, grid)
    for name, placeholder in made.items():
        nncf_quantizers.replace_quantizer(module, name, placeholder)


def _weight_placeholder(module: nn.Module, name: str, layer: LayerWiring) -> _Placeholder:
    step = nncf_quantizers.weight_step(nncf_quantizers.quantizer_at(module, layer.weight[0]))
    n_channels = quantized_weight(module, layer).shape[layer.channel_axis]
    scale = step.reshape(-1).expand(n_channels).contiguous()
    facts = _WeightFacts(name, layer_codes(module, layer).to(torch.int8), scale, layer.channel_axis)
    return _Placeholder(_WeightFunction, facts)


def _expand(model: Any, declaration: Declaration) -> None:
    """Replace every placeholder of an ONNX model by standard operators, in place."""
    onnx = require("onnx", "onnx")
    graph = model.graph
    initializers: dict[str, np.ndarray] = {}
    nodes: list[Any] = []
    calls: dict[str, int] = {}
    layer_of: dict[str, str] = {}  # tensor name -> layer whose dequantized weight it is
    for node in graph.node:
        if node.domain == _DOMAIN:
            facts = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            if node.op_type == "Weight":
                layer_of[node.output[0]] = facts["layer"].decode()
            nodes += (
                _weight(onnx, node, facts, declaration, initializers)
                if node.op_type == "Weight"
                else _activation(onnx, node, facts, initializers)
            )
            continue
        for name in node.input:
            if name in layer_of and node.op_type in ("Transpose", "Reshape", "Unsqueeze", "Squeeze"):
                layer_of[node.output[0]] = layer_of[name]
            elif name in layer_of:
                layer = layer_of[name]
                node.name = f"{layer}{CALL}{calls.get(layer, 0)}"
                calls[layer] = calls.get(layer, 0) + 1
        nodes.append(node)
    for node in nodes:
        node.ClearField("doc_string")  # the exporter's stack trace: larger than the weights of a small net, and full of paths
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in initializers.items())
    kept_opsets = [opset for opset in model.opset_import if opset.domain != _DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(kept_opsets)


def _weight(
    onnx: Any, node: Any, facts: Mapping[str, Any], declaration: Declaration, initializers: dict[str, np.ndarray]
) -> list[Any]:
    layer = facts["layer"].decode()
    holder = declaration.layers[layer].stored_as
    codes, scale = f"{holder}{WEIGHT}", f"{holder}{WEIGHT}_scale"
    initializers[codes] = onnx.numpy_helper.to_array(facts["codes"])
    initializers[scale] = onnx.numpy_helper.to_array(facts["scale"])
    return [onnx.helper.make_node("DequantizeLinear", [codes, scale], [node.output[0]], node.output[0], axis=facts["axis"])]


def _activation(onnx: Any, node: Any, facts: Mapping[str, Any], initializers: dict[str, np.ndarray]) -> list[Any]:
    name, low, high = node.output[0], facts["low"], facts["high"]
    kind = np.dtype(np.int8 if low < 0 else np.uint8)
    scale, zero_point = onnx.numpy_helper.to_array(facts["scale"]), onnx.numpy_helper.to_array(facts["zero_point"])
    shape = (-1,) if scale.size > 1 else ()
    initializers[f"{name}_scale"] = scale.reshape(shape).astype(np.float32)
    initializers[f"{name}_zero_point"] = zero_point.reshape(shape).astype(kind)
    axis = {"axis": 1} if scale.size > 1 else {}
    grid = [f"{name}_scale", f"{name}_zero_point"]
    codes = f"{name}_codes"
    nodes = [onnx.helper.make_node("QuantizeLinear", [node.input[0], *grid], [codes], codes, **axis)]
    if (low, high) != (np.iinfo(kind).min, np.iinfo(kind).max):
        initializers[f"{name}_low"], initializers[f"{name}_high"] = np.array(low, kind), np.array(high, kind)
        clipped = f"{name}_clipped"
        nodes.append(onnx.helper.make_node("Clip", [codes, f"{name}_low", f"{name}_high"], [clipped], clipped))
        codes = clipped
    return [*nodes, onnx.helper.make_node("DequantizeLinear", [codes, *grid], [name], name, **axis)]
