"""Running an exported file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mpq_nncf.ir_read import load_ir
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import FormatError
from mpq_plugins.model.run import tensors

# What the file says, without fusing quantizers into integer kernels or quantizing activations on the fly.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def run(path: str | Path, inputs: Any, *, exact: bool) -> list[np.ndarray]:
    """Outputs as float arrays: OpenVINO's CPU plugin for .xml, onnxruntime for .onnx."""
    path = Path(path)
    if path.suffix == ".xml":
        return _run_openvino(path, inputs, exact=exact)
    if path.suffix == ".onnx":
        return _run_onnx(path, inputs, exact=exact)
    raise FormatError(f"{path} is neither .xml (OpenVINO) nor .onnx. Give the file that export() returned.")


def _run_openvino(path: Path, inputs: Any, *, exact: bool) -> list[np.ndarray]:
    openvino = require("openvino", "nncf")
    model = load_ir(path)
    compiled = openvino.Core().compile_model(model, "CPU", EXACT if exact else {})
    result = compiled(_named(inputs, [port.get_any_name() for port in model.inputs]))
    return [np.asarray(result[index], dtype=np.float32) for index in range(len(model.outputs))]


def _run_onnx(path: Path, inputs: Any, *, exact: bool) -> list[np.ndarray]:
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions derive from Exception alone
        raise FormatError(f"onnxruntime cannot read {path}: {error}. Export it again.") from error
    named = _named(inputs, [port.name for port in session.get_inputs()])
    return [np.asarray(value, dtype=np.float32) for value in session.run(None, named)]


def _named(inputs: Any, names: list[str]) -> dict[str, np.ndarray]:
    if isinstance(inputs, Mapping):
        return {key: _array(value) for key, value in inputs.items() if key in names}
    return {name: _array(value) for name, value in zip(names, tensors(inputs), strict=True)}


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
