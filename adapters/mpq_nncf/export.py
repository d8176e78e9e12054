"""From a quantized module to a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import nn

from mpq_nncf.declaration import Declaration, declare
from mpq_nncf.set_bits import use_float_weights
from mpq_nncf.wiring import wiring_of
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.parametrized import without_parametrizations

SUFFIXES = {"openvino-compact": ".xml", "openvino-fast": ".xml", "onnx": ".onnx", "onnx-compact": ".onnx"}


def export(module: nn.Module, path: str | Path, example: Any, *, format: str) -> Path:
    """Write `module` as `format`; returns the main file, whose suffix is the format's."""
    path = Path(path)
    if path.suffix.lower() in {".xml", ".bin", ".onnx"} - {SUFFIXES[format]}:
        raise AdapterError(
            f"{path.name} is no name for a file of format {format}, which ends in {SUFFIXES[format]}. Name it "
            f"{path.with_suffix(SUFFIXES[format]).name}, or choose another of the formats {', '.join(SUFFIXES)} (--format)."
        )
    if path.suffix != SUFFIXES[format]:
        path = path.with_name(path.name + SUFFIXES[format])
    frozen = without_parametrizations(use_float_weights(copy.deepcopy(module).eval(), on=False))
    if SUFFIXES[format] == ".onnx":
        from mpq_nncf.onnx_export import export_onnx

        return export_onnx(frozen, path, example, declaration(frozen), packed=format == "onnx-compact")
    from mpq_nncf.ir_export import export_ir

    return export_ir(frozen, path, example, declaration(frozen), widen=format == "openvino-fast")


def declaration(module: nn.Module) -> Declaration:
    """What the file will say about itself."""
    wiring = wiring_of(module)
    first = {}
    for name, layer in wiring.items():
        first.setdefault(layer.parameter, name)
    shapes = {name: module.get_parameter(layer.parameter).shape for name, layer in wiring.items()}
    return declare(bits_of(module), shapes, {name: first[layer.parameter] for name, layer in wiring.items()})
