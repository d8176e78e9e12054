"""FINN's own build steps up to its estimates, in a process of their own: `finn_judge.py REQUEST REPORT`, both JSON.

Only this file imports FINN. It imports nothing of ours, because FINN's environment need not hold it.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose finn.py would hide FINN
    warnings.filterwarnings("ignore")

# FINN's default build up to its estimates.
STEPS = (
    *("qonnx_to_finn", "tidy_up", "streamline", "convert_to_hw", "minimize_bit_width_initial", "create_dataflow_partition"),
    *("specialize_layers", "target_fps_parallelization", "apply_folding_config", "minimize_bit_width"),
    *("transpose_decomposition", "generate_estimate_reports"),
)
_HARDWARE = "finn.custom_op.fpgadataflow"
_RESOURCES = {"LUT": "lut", "DSP": "dsp", "BRAM_18K": "bram18", "URAM": "uram"}


def judge(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What FINN makes of the file: each step's verdict in order up to the first that fails, and the estimates."""
    import numpy as np
    from finn.util.settings import initialize_dummy_settings

    initialize_dummy_settings()
    # Vivado's simulator is imported by name only: no step here starts it.
    sys.modules["finn.xsi"] = types.SimpleNamespace(SimEngine=None)  # type: ignore[assignment]
    from finn.builder import build_dataflow_steps
    from finn.builder.build_dataflow_config import DataflowBuildConfig, DataflowOutputType
    from qonnx.core.modelwrapper import ModelWrapper

    configuration = DataflowBuildConfig(
        output_dir=str(folder),
        synth_clk_period_ns=request["clock_ns"],
        generate_outputs=[DataflowOutputType.ESTIMATE_REPORTS],
        fpga_part=request["part"],
        target_fps=request["fps"],
        standalone_thresholds=True,  # which lets FINN choose DSP slices for products
        save_intermediate_models=True,
    )
    model = ModelWrapper(request["path"])
    arrays = np.load(request["arrays"])
    codes = {name.removeprefix("codes/"): np.sort(arrays[name], None) for name in arrays.files if name.startswith("codes/")}
    report: dict[str, Any] = {"steps": [], "host": [], "nodes": {}, "total": {}}
    for name in STEPS:
        step = _streamline if name == "streamline" else getattr(build_dataflow_steps, f"step_{name}")
        begun, found = time.process_time(), {"name": name, "ok": True}
        report["steps"].append(found)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                model = step(model, configuration)
                if name == "qonnx_to_finn":
                    _tell_layouts(model)
            found["cpu_seconds"] = time.process_time() - begun
            parent = folder / "intermediate_models" / "dataflow_parent.onnx"
            found["difference"] = _difference(model, arrays["inputs"], arrays["outputs"], parent)
        except Exception as error:
            node = _named(str(error), model)
            found |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
            found |= {"node": node and node.name, "layer": node and _layer(model, node, codes)}
            return report
        if name == "convert_to_hw":
            report["host"] = [node.name for node in model.graph.node if not node.domain.startswith(_HARDWARE)]
    return report | _estimates(model, folder / "report", codes)


def _estimates(model: Any, folder: Path, codes: dict[str, Any]) -> dict[str, Any]:
    """FINN's reports, per node of the accelerator and in total."""
    resources = json.loads((folder / "estimate_layer_resources.json").read_text())
    cycles = json.loads((folder / "estimate_layer_cycles.json").read_text())
    speed = json.loads((folder / "estimate_network_performance.json").read_text())
    counted = {name: {ours: own.get(theirs, 0) for theirs, ours in _RESOURCES.items()} for name, own in resources.items()}
    nodes = {
        node.name: {"operation": node.op_type, "layer": _weights_of(model, node, codes), "cycles": cycles.get(node.name, 0)}
        | counted[node.name]
        for node in model.graph.node
    }
    total = {**counted["total"], "fps": speed["estimated_throughput_fps"]}
    return {"nodes": nodes, "total": total | {name: speed[name] for name in ("max_cycles", "critical_path_cycles")}}


def _difference(model: Any, inputs: Any, outputs: Any, parent: Path) -> float | None:
    """Largest difference from the module's outputs; None where the step's graph needs Vivado's simulation to run."""
    import numpy as np
    from finn.core.onnx_exec import execute_onnx

    if any(node.domain.endswith((".hls", ".rtl")) for node in model.graph.node):
        return None
    whole = model
    if parent.exists():
        from qonnx.core.modelwrapper import ModelWrapper

        whole = ModelWrapper(str(parent))
    source, target = whole.graph.input[0].name, whole.graph.output[0].name
    largest = 0.0
    for image, expected in zip(inputs, outputs, strict=True):
        given = image.astype(np.float32).reshape(whole.get_tensor_shape(source))
        with contextlib.redirect_stdout(io.StringIO()):
            found = execute_onnx(whole, {source: given})[target]
        largest = max(largest, float(np.abs(found.reshape(expected.shape) - expected).max()))
    return largest


def _named(text: str, model: Any) -> Any | None:
    """The first node of the graph that an error names."""
    nodes = {node.name: node for node in model.graph.node}
    words = (word.strip(".") for word in re.findall(r"[\w./]+", text))
    return next((nodes[word] for word in words if word in nodes), None)


def _layer(model: Any, node: Any, codes: dict[str, Any]) -> str | None:
    """The layer that a node computes, or else the last one in front of it."""
    while node is not None:
        found = _weights_of(model, node, codes)
        if found is not None:
            return found
        node = model.find_producer(node.input[0])
    return None


def _weights_of(model: Any, node: Any, codes: dict[str, Any]) -> str | None:
    """The layer whose codes a node multiplies by; FINN renames nodes and moves weights, and keeps their values."""
    import numpy as np

    if len(node.input) < 2 or not node.op_type.startswith(("MatMul", "Conv", "MVAU", "VVAU")):
        return None
    weights = model.get_initializer(node.input[1])
    if weights is None:
        return None
    found = np.sort(weights, None)
    return next((name for name, own in codes.items() if own.shape == found.shape and np.array_equal(own, found)), None)


def _tell_layouts(model: Any) -> None:
    """Images in front of the first thresholds are channels first: qonnx infers no layout from the graph's input."""
    from qonnx.custom_op.registry import getCustomOp

    for node in model.get_nodes_by_op_type("MultiThreshold"):
        operation = getCustomOp(node)
        if len(model.get_tensor_shape(node.output[0])) == 4 and operation.get_nodeattr("data_layout") == "":
            operation.set_nodeattr("data_layout", "NCHW")


def _streamline(model: Any, configuration: Any) -> Any:
    """The stock step; with forks and joins FINN's exhaustive streamlining; behind either, global pooling in hardware."""
    from finn.builder.build_dataflow_steps import step_streamline
    from finn.transformation.streamline.absorb import AbsorbSignBiasIntoMultiThreshold
    from finn.transformation.streamline.reorder import MakeMaxPoolNHWC
    from finn.transformation.streamline.streamline_plus import StreamlinePlus
    from qonnx.transformation.general import RemoveUnusedTensors
    from qonnx.transformation.infer_data_layouts import InferDataLayouts
    from qonnx.transformation.lower_convs_to_matmul import LowerConvsToMatMul

    if _forks(model):
        for step in (AbsorbSignBiasIntoMultiThreshold(), StreamlinePlus(), LowerConvsToMatMul(), MakeMaxPoolNHWC()):
            model = model.transform(step)
        for step in (StreamlinePlus(), MakeMaxPoolNHWC(), StreamlinePlus()):
            model = model.transform(step)
    else:
        model = step_streamline(model, configuration)
    if model.get_nodes_by_op_type("GlobalAveragePool"):
        model = _pool_in_hardware(model)
    return model.transform(InferDataLayouts()).transform(RemoveUnusedTensors())


def _pool_in_hardware(model: Any) -> Any:
    """Sums in place of global averages, their factor moved into the thresholds behind and their flattening left out."""
    from finn.transformation.fpgadataflow.convert_to_hw.global_acc_pool import InferGlobalAccPoolLayer
    from finn.transformation.streamline import absorb, reorder
    from finn.transformation.streamline.round_thresholds import RoundAndClipThresholds
    from qonnx.transformation.general import GiveReadableTensorNames, GiveUniqueNodeNames
    from qonnx.transformation.infer_data_layouts import InferDataLayouts
    from qonnx.transformation.infer_datatypes import InferDataTypes

    model = model.transform(InferDataLayouts()).transform(InferGlobalAccPoolLayer())
    for _ in range(3):
        for step in (
            *(absorb.AbsorbConsecutiveTransposes(), reorder.MoveTransposePastScalarMul(), absorb.AbsorbTransposeIntoFlatten()),
            *(reorder.MoveScalarLinearPastInvariants(), absorb.AbsorbMulIntoMultiThreshold(), RoundAndClipThresholds()),
            *(GiveUniqueNodeNames(), GiveReadableTensorNames(), InferDataTypes(), InferDataLayouts()),
        ):
            model = model.transform(step)
    return model


def _forks(model: Any) -> bool:
    """Whether a value has several readers, or is joined with another."""
    return any(
        len(model.find_consumers(node.output[0])) > 1
        or (node.op_type in ("Add", "Concat") and not any(model.get_initializer(name) is not None for name in node.input))
        for node in model.graph.node
    )


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(judge(asked, Path.cwd())))
