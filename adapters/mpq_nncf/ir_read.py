"""Codes and levels in an OpenVINO IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mpq_nncf.declaration import CALL, KEY, WEIGHT, Declaration, Found, Levels, json_or_none
from mpq_nncf.ir_graph import levels_of, weights
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import FormatError


def load_ir(path: Path) -> Any:
    """The OpenVINO model of an .xml with its .bin; raises `FormatError`."""
    openvino = require("openvino", "nncf")
    for part in (path, path.with_suffix(".bin")):
        if not part.is_file():
            raise FormatError(f"{part} does not exist. OpenVINO needs the .xml and the .bin of one export side by side.")
    try:
        # Memory mapping would let another export over the same file change a model that is being read.
        return openvino.Core().read_model(path, config={"ENABLE_MMAP": "NO"})
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise FormatError(f"OpenVINO cannot read {path} with its .bin: {reason}. Export it again.") from error


def read_ir(path: Path) -> tuple[Declaration | None, dict[str, Found]]:
    """What the file declares, and what it holds by stored name."""
    model = load_ir(path)
    text = json_or_none(model.get_rt_info(KEY).value) if model.has_rt_info(KEY) else None
    found = {}
    for weight in weights(model):
        holder = weight.name.removesuffix(WEIGHT)
        levels: dict[str, Levels] = {}
        for operation in weight.operations:
            user, marked, _ = operation.get_friendly_name().rpartition(CALL)
            user = user if marked else holder
            levels[user] = (*levels.get(user, ()), *levels_of(operation))
        found[holder] = Found(weight.codes(), weight.storage.bits, levels)
    return None if text is None else Declaration.loads(text, where=str(path)), found
