"""ONNX files, read as a graph that can be walked, and run by onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpq_plugins.common.plugins import require
from mpq_plugins.errors import FormatError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OnnxGraph:
    """A loaded ONNX model."""

    model: Any
    path: Path

    @classmethod
    def load(cls, path: str | Path, *, extra: str = "onnx", check: bool = False) -> OnnxGraph:
        """Read a file; raises `FormatError` for one that is damaged or, where `check` asks for it, no standard ONNX.

        `extra` installs what is missing.
        """
        onnx = require("onnx", extra)
        path = Path(path)
        if not path.exists():
            raise FormatError(f"{path} does not exist. Give the file that export() returned.")
        try:
            model = onnx.load(path)
            if check:
                onnx.checker.check_model(model)
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror or error}. Check the path and its permissions.") from error
        except Exception as error:  # protobuf's and onnx's errors have no common base
            reason = str(error)[:200] or type(error).__name__
            raise FormatError(f"{path} is not a complete ONNX file: {reason}. Export it again.") from error
        if not model.graph.node:
            raise FormatError(f"{path} holds an ONNX graph without operations. It was cut off; export it again.")
        return cls(model, path)

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Name -> tensor proto of every constant."""
        found = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant":
                found[node.output[0]] = next(item.t for item in node.attribute if item.name == "value")
        return found

    @cached_property
    def producers(self) -> dict[str, Any]:
        """Tensor name -> the node that computes it."""
        return {output: node for node in self.model.graph.node for output in node.output if node.op_type != "Constant"}

    @cached_property
    def readers(self) -> dict[str, list[tuple[Any, int]]]:
        """Tensor name -> the nodes that read it, each with the position among its inputs."""
        found: dict[str, list[tuple[Any, int]]] = {}
        for node in self.model.graph.node:
            for index, name in enumerate(node.input):
                found.setdefault(name, []).append((node, index))
        return found

    def metadata_text(self, key: str) -> str | None:
        """What the exporter wrote under `key`, or None."""
        return next((str(item.value) for item in self.model.metadata_props if item.key == key), None)

    def constant(self, name: str) -> Array | None:
        """The value of a constant, or None when `name` is computed."""
        from onnx import numpy_helper

        tensor = self.constants.get(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def value(self, name: str, *, of: str) -> Array:
        """The value of a constant; raises `FormatError` when it is computed."""
        found = self.constant(name)
        if found is None:
            raise FormatError(f"{self.path}: {of} takes {name!r} as a parameter, which is not a constant. Export it again.")
        return found


def onnx_session(model: bytes | str, *, exact: bool, extra: str = "onnx") -> Any:
    """An onnxruntime session on the CPU, of a model or the path of its file; raises `FormatError` for what it cannot load.

    `exact` switches graph optimisations off: they fuse Q/DQ pairs into kernels that round differently.
    """
    runtime = require("onnxruntime", extra)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    if exact:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own exceptions derive from Exception alone
        what = model if isinstance(model, str) else "this model"
        raise FormatError(f"onnxruntime cannot read {what}: {error}. Export it again.") from error


def feeds(names: Sequence[str], inputs: Any) -> dict[str, Array]:
    """The inputs of a file by name, as arrays; raises `FormatError` where some are missing or too many."""
    values = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if isinstance(inputs, Mapping):  # may hold what the file has as a constant
        given = {name: inputs[name] for name in names if name in inputs}
    else:
        given = dict(zip(names, values, strict=False))
    if len(given) != len(names) or len(values) > len(names):
        told = ", ".join(map(str, inputs)) if isinstance(inputs, Mapping) else f"{len(values)} by position"
        raise FormatError(f"the file takes the inputs {', '.join(names)}, not {told}.")
    return {name: np.asarray(value.detach().cpu() if hasattr(value, "detach") else value) for name, value in given.items()}
