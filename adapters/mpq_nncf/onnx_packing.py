"""Weights of few bits in ONNX's own types for them: INT4 (opset 21) and INT2 (opset 25)."""

from __future__ import annotations

from typing import Any

from mpq_nncf.declaration import WEIGHT, Declaration
from mpq_nncf.ir_storage import Storage, pack
from mpq_plugins.adapter.onnx_graph import onnx_session
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import AdapterError

# Their layouts are OpenVINO's, and the opset is the one whose DequantizeLinear reads them.
_TYPES = (Storage("INT2", 2, zero_point=0), Storage("INT4", 4, zero_point=0))
_OPSETS = {"INT2": 25, "INT4": 21}


def pack_weights(model: Any, declaration: Declaration) -> Any:
    """The model with the codes of layers of 2 to 4 bits in the smallest type that the installed onnxruntime loads.

    Raises `AdapterError` where it loads none.
    """
    onnx = require("onnx", "onnx")
    widths = {layer.stored_as: layer.precision.weight for layer in declaration.layers.values()}
    if min(widths.values(), default=8) > _TYPES[-1].bits:
        return model
    failure: Exception | None = None
    for types in (_TYPES, _TYPES[1:]):
        usable = [kind for kind in types if hasattr(onnx.TensorProto, kind.name)]
        chosen = {
            f"{layer}{WEIGHT}": next(kind for kind in usable if width <= kind.bits)
            for layer, width in widths.items()
            if any(width <= kind.bits for kind in usable)
        }
        if not chosen:
            continue
        try:
            return _loadable(onnx, model, chosen)
        except Exception as error:  # neither onnx's nor onnxruntime's errors have a base of their own
            failure = error
    reason = "onnx has no INT4" if failure is None else f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"
    raise AdapterError(
        f"the installed onnxruntime does not load this model with weights in 4 bits: {reason}. Export to onnx (8-bit codes) "
        "or install other versions of onnx and onnxruntime (opset 21 at least)."
    )


def _loadable(onnx: Any, model: Any, chosen: dict[str, Storage]) -> Any:
    packed = onnx.version_converter.convert_version(model, max(_OPSETS[kind.name] for kind in chosen.values()))
    packed.ir_version = max(packed.ir_version, onnx.helper.find_min_ir_version_for(list(packed.opset_import)))
    for tensor in packed.graph.initializer:
        if tensor.name in chosen:
            codes = onnx.numpy_helper.to_array(tensor)
            kind = chosen[tensor.name]
            element = getattr(onnx.TensorProto, kind.name)
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, element, codes.shape, pack(codes, kind).tobytes(), raw=True))
    onnx_session(packed.SerializeToString(), exact=False)
    return packed


def storage_bits(tensor: Any) -> int | None:
    """The width of the type that a constant of codes is stored in; None for other constants."""
    onnx = require("onnx", "onnx")
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    return {"INT8": 8, **{kind.name: kind.bits for kind in _TYPES}}.get(name)
