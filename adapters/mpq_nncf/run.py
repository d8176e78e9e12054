"""Running an exported file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mpq_nncf.ir_read import load_ir
from mpq_plugins.adapter.onnx_graph import feeds, onnx_session
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import FormatError

# What the file says, without fusing quantizers into integer kernels or quantizing activations on the fly.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "NO", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def run(path: str | Path, inputs: Any, *, exact: bool) -> list[np.ndarray]:
    """Outputs as float arrays: OpenVINO's CPU plugin for .xml, onnxruntime for .onnx."""
    path = Path(path)
    if path.suffix == ".xml":
        return _run_openvino(path, inputs, exact=exact)
    if path.suffix == ".onnx":
        session = onnx_session(str(path), exact=exact)
        named = feeds([port.name for port in session.get_inputs()], inputs)
        return [np.asarray(value, dtype=np.float32) for value in session.run(None, named)]
    raise FormatError(f"{path} is neither .xml (OpenVINO) nor .onnx. Give the file that export() returned.")


def _run_openvino(path: Path, inputs: Any, *, exact: bool) -> list[np.ndarray]:
    openvino = require("openvino", "nncf")
    model = load_ir(path)
    compiled = openvino.Core().compile_model(model, "CPU", EXACT if exact else {})
    result = compiled(feeds([port.get_any_name() for port in model.inputs], inputs))
    return [np.asarray(result[index], dtype=np.float32) for index in range(len(model.outputs))]
