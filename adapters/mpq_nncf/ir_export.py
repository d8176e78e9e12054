"""OpenVINO IR with every weight at the width that was asked for, written so that its CPU plugin computes what it says.

The plugin (2026.4) merges a multiplication or addition per channel, with or without a ReLU behind it, into the FakeQuantize
that reads it. Where the batch axis is open it then computes something else, at any rank whose channels are the second axis:
without its low-precision transformations (`run` with `exact`) at every width, by default at widths other than 4 and 8 bits,
behind a ReLU at those as well. That meets batch normalisation in front of a layer, input normalisation, LayerScale and
SmoothQuant's factors. Arithmetic that the operation before takes up, be it a convolution, a matrix product or a
normalisation, is computed right, and so is any with another operation between: see `_part_from_scaling`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.codes import quantized_weight, stored_codes
from mpq_nncf.declaration import ACTIVATION, CALL, KEY, WEIGHT, Declaration
from mpq_nncf.internals import quiet
from mpq_nncf.ir_read import Weight, feeding_quantizers, weights
from mpq_nncf.ir_storage import Storage, compact, pack, widest
from mpq_nncf.wiring import wiring_of
from mpq_plugins.adapter.positional import positional
from mpq_plugins.adapter.spelled import Spelled
from mpq_plugins.common.files import NO_ROOM, check_replaceable, disk_refusal
from mpq_plugins.common.partial import partial_folder
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import AdapterError, WriteError

_NOTHING = 1e-30  # beside any activation
_ARITHMETIC = frozenset("Add Subtract Multiply Divide".split())
_LIMITS = frozenset("Relu Clamp".split())  # merged as well
_NEUTRAL = frozenset("Reshape Squeeze Unsqueeze Convert".split())  # may be removed as having no effect
_TAKING_UP = frozenset("Convolution GroupConvolution ConvolutionBackpropData GroupConvolutionBackpropData MatMul MVN".split())
_LEAST = np.array(np.finfo(np.float32).min)


def export_ir(module: nn.Module, path: Path, example: Any, declaration: Declaration, *, widen: bool) -> Path:
    """Write `path` and its .bin; `widen` keeps all weights in the 8-bit type that integer kernels read.

    `module` is a copy that may be changed.
    """
    codes = stored_codes(module, declaration)
    _put_on_grid(module)
    model, names = _converted(module, example)
    if _lost(model, codes):
        _without_zeros(module)
        model, names = _converted(module, example)
    for port, name in zip(model.inputs, names, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    _part_from_scaling(model)
    for layer, found in _match(model, codes).items():
        storage = widest() if widen else compact(declaration.layers[layer].precision.weight)
        _store(layer, found, codes[layer], storage)
        users = [name for name, declared in declaration.layers.items() if declared.stored_as == layer]
        _name_calls(users, [operation for weight in found for operation in weight.operations])
    model.validate_nodes_and_infer_types()
    model.set_rt_info(declaration.dumps(), KEY)
    return _save(model, path)


def _converted(module: nn.Module, example: Any) -> tuple[Any, tuple[str, ...]]:
    """OpenVINO's model of a module, and the names of its inputs."""
    openvino = require("openvino", "nncf")
    wrapped, values, names = positional(module, example)
    with quiet(), Spelled():
        # OpenVINO would trace by itself, and once more to compare.
        traced = torch.jit.trace(wrapped, values, strict=False, check_trace=False)
        return openvino.convert_model(traced, example_input=values), names


def _lost(model: Any, codes: Mapping[str, np.ndarray]) -> bool:
    """Whether conversion dropped the weight of some layer."""
    kept = {values.tobytes() for values in (weight.codes() for weight in weights(model))}
    return any(values.tobytes() not in kept for values in codes.values())


def _without_zeros(module: nn.Module) -> None:
    """Give parameters that are all zero the least value that counts for nothing, in place.

    OpenVINO drops what is multiplied by zero: the layers before a batch normalisation, or a residual factor, that begins at 0.
    """
    weighted = {layer.parameter for layer in wiring_of(module).values()}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name not in weighted and parameter.is_floating_point() and not bool(parameter.any()):
                parameter.fill_(_NOTHING)


@final
class _OnGrid(nn.Module):
    """A weight's quantizer, given the quantized weight: so OpenVINO's rounding cannot differ from torch's.

    The parameter itself stays as it is, since others may read it in float, such as an embedding tied to the layer.
    """

    def __init__(self, quantizer: nn.Module, weight: torch.Tensor) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.register_buffer("weight", weight)

    def forward(self, _: torch.Tensor) -> Any:
        return self.quantizer(self.weight)


def _put_on_grid(module: nn.Module) -> None:
    weights = {layer.parameter: quantized_weight(module, layer) for layer in wiring_of(module).values()}
    for layer in wiring_of(module).values():
        for hook in layer.weight:
            quantizer = nncf_quantizers.quantizer_at(module, hook)
            nncf_quantizers.as_one_range(quantizer)
            nncf_quantizers.replace_quantizer(module, hook, _OnGrid(quantizer, weights[layer.parameter]))


def _match(model: Any, codes: Mapping[str, np.ndarray]) -> dict[str, list[Weight]]:
    """Layer name -> its constants, found by their codes; conversion does not keep torch's names.

    Layers whose codes are all equal are told apart by the order of their operations.
    """
    constants: dict[tuple[tuple[int, ...], bytes], list[Weight]] = {}
    for weight in weights(model):
        values = weight.codes()
        constants.setdefault((values.shape, values.tobytes()), []).append(weight)
    alike: dict[tuple[tuple[int, ...], bytes], list[str]] = {}
    for layer, values in codes.items():
        alike.setdefault((values.shape, values.tobytes()), []).append(layer)
    matched: dict[str, list[Weight]] = {}
    for key, layers in alike.items():
        found = constants.get(key, [])
        if not found or (len(layers) > 1 and len(found) != len(layers)):
            raise AdapterError(
                f"OpenVINO's conversion holds {len(found)} constants with the weight codes of {', '.join(layers)}, "
                f"expected {len(layers)}. Conversion drops what reaches no output. Exclude the layer so that it stays in "
                "float, or export to onnx."
            )
        for index, layer in enumerate(layers):
            matched[layer] = found if len(layers) == 1 else [found[index]]
    return matched


def _store(layer: str, found: list[Weight], codes: np.ndarray, storage: Storage) -> None:
    """Replace the constants of a layer by one of the wanted type, and name what belongs to the layer."""
    from openvino import Shape, Tensor, Type, opset13
    from openvino.op import Constant

    stored = Tensor(getattr(Type, storage.name), Shape(list(codes.shape)))
    stored.data.reshape(-1).view(np.uint8)[:] = pack(codes, storage)  # OpenVINO owns this memory; numpy's it would only borrow
    constant = Constant(stored)
    constant.set_friendly_name(layer + WEIGHT)
    values = opset13.convert(constant, "f32")
    if storage.zero_point:
        values = opset13.subtract(values, opset13.constant(np.array(storage.zero_point, np.float32)))
    for weight in found:
        for target in list(weight.constant.output(0).get_target_inputs()):
            reader = target.get_node()
            if reader.get_type_name() != "Convert":
                raise AdapterError(
                    f"{layer}: OpenVINO's conversion reads its codes by {reader.get_type_name()}. Export to onnx."
                )
            for outer in list(reader.output(0).get_target_inputs()):
                outer.replace_source_output(values.output(0))


def _name_calls(users: list[str], operations: list[Any]) -> None:
    """Name the operations of the layers that share one weight, and the quantizers that feed them."""
    for index, (operation, user) in enumerate(zip(operations, _users_of(users, operations), strict=True)):
        operation.set_friendly_name(f"{user}{CALL}{index}")
        for quantizer in feeding_quantizers(operation):
            if quantizer is not None and not quantizer.get_friendly_name().endswith(ACTIVATION):
                quantizer.set_friendly_name(user + ACTIVATION)


def _users_of(users: list[str], operations: list[Any]) -> list[str]:
    if len(users) == 1:
        return users * len(operations)
    names = [f"{operation.get_friendly_name()}/" for operation in operations]
    told = [next((user for user in users if f".{user}/" in name), None) for name in names]
    if None not in told:
        return [user for user in told if user is not None]
    if len(users) == len(operations):  # conversion keeps the order of calls where it drops their names
        return users
    raise AdapterError(
        f"{', '.join(users)} hold one weight, and OpenVINO's conversion does not tell their {len(operations)} calls apart. "
        "Give the layers copies of the weight, or export to onnx."
    )


def _save(model: Any, path: Path) -> Path:
    """Write .xml and .bin, both or none; raises `WriteError` when the folder or the disk refuses."""
    try:
        return _save_pair(model, path)
    except (OSError, RuntimeError) as error:  # OpenVINO raises its own RuntimeError on a full disk
        last = str(error).strip().splitlines()[-1][:200]
        reason = disk_refusal(error) or (NO_ROOM if "iostream" in last else last)
        raise WriteError(
            f"cannot write {path} and its .bin: {reason}. "
            "Choose a file name in a folder that you may write to, with space left."
        ) from error


def _save_pair(model: Any, path: Path) -> Path:
    """Write .xml and .bin beside their places, then move both in; whatever fails, the old pair stays whole."""
    openvino = require("openvino", "nncf")
    for suffix in (".bin", ".xml"):
        check_replaceable(path.with_suffix(suffix))
    with partial_folder(path.parent) as directory:
        temporary = directory / path.name
        openvino.save_model(model, temporary, compress_to_fp16=False)  # f16 scales would move every weight
        # The .xml does not name its .bin: both must share a stem.
        moves = [(temporary.with_suffix(suffix), path.with_suffix(suffix)) for suffix in (".bin", ".xml")]
        kept: list[tuple[Path, Path]] = []
        done: list[Path] = []
        try:
            for _, target in reversed(moves):  # the .xml goes first and comes last: where there is one, its .bin is there too
                if target.exists():
                    aside = directory / f"old{target.suffix}"
                    target.replace(aside)
                    kept.append((aside, target))
            for source, target in moves:
                source.replace(target)
                done.append(target)
        except BaseException:
            for target in done:
                target.unlink(missing_ok=True)
            for aside, target in kept:
                with contextlib.suppress(OSError):
                    aside.replace(target)
            raise
    return path


def _part_from_scaling(model: Any) -> None:
    """Put an operation that changes nothing between quantizers and the arithmetic per channel that feeds them, in place.

    It is the maximum with the least number there is: not merged into the quantizer, and of no shape of its own.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize" and _is_scaled(node.input_value(0)):
            parted = opset13.maximum(node.input_value(0), opset13.constant(_LEAST))
            node.input(0).replace_source_output(parted.output(0))


def _is_scaled(output: Any) -> bool:
    """Whether a tensor was added to or multiplied with a constant of several values that no operation before takes up."""
    found, is_read_once = False, True
    while output.get_node().get_type_name() in _ARITHMETIC | _LIMITS | _NEUTRAL:
        node = output.get_node()
        is_read_once = is_read_once and len(output.get_target_inputs()) == 1
        data, *others = sorted(node.input_values(), key=_is_constant)
        if node.get_type_name() in _ARITHMETIC:
            if not any(map(_is_constant, others)):
                return found
            found = found or any(_is_constant(other) and other.get_node().data.size > 1 for other in others)
        output = data
    is_read_once = is_read_once and len(output.get_target_inputs()) == 1
    return found and not (is_read_once and output.get_node().get_type_name() in _TAKING_UP)


def _is_constant(output: Any) -> bool:
    return bool(output.get_node().get_type_name() == "Constant")
