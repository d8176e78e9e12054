"""What an exported file holds, from the file alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mpq_nncf.declaration import Declaration, Found, shaped, weighed_bits
from mpq_plugins.errors import FormatError
from mpq_plugins.space.bits import BitConfig


def read_bits(path: str | Path) -> BitConfig:
    """See `AbstractAdapter.read_bits`."""
    return weighed_bits(*_read(Path(path)))


def read_codes(path: str | Path) -> dict[str, np.ndarray]:
    """See `AbstractAdapter.read_codes`."""
    return shaped(*_read(Path(path)))


def _read(path: Path) -> tuple[Declaration | None, Mapping[str, Found]]:
    if path.suffix == ".xml":
        from mpq_nncf.ir_read import read_ir

        return read_ir(path)
    if path.suffix == ".onnx":
        from mpq_nncf.onnx_read import read_onnx

        return read_onnx(path)
    raise FormatError(f"{path} is neither .xml (OpenVINO) nor .onnx. Give the file that export() returned.")
