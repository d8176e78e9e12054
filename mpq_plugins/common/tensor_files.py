"""Files of tensors, checked before they are believed: torch's archives and safetensors."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_plugins.common.files import NO_ROOM, disk_refusal, write_error, write_whole
from mpq_plugins.errors import FormatError

_OTHER = "it does not begin as torch's files do"


def read_torch(path: str | Path, what: str = "file of tensors", advice: str = "Write it again") -> Any:
    """What `torch.save` wrote, on the CPU; nothing in the file is executed.

    torch itself compares no checksums, so that a damaged weight would be a silently different one. `what` the file
    should be and the `advice` are for the text of the error. Raises `FormatError`.
    """
    path = Path(path)
    try:
        _check_archive(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except FormatError:
        raise
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}. Check the path and its permissions.") from error
    except Exception as error:  # torch raises errors of many kinds for damaged archives
        # torch's own text advises weights_only=False, which would run whatever code the file holds.
        raise FormatError(f"{path} is no {what}, or a damaged one: {_told(error)}. {advice}.") from error


def _check_archive(path: Path) -> None:
    """Compare the checksums of a zip archive; older files of torch are none, and have none."""
    with path.open("rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":
        if not start.startswith(b"\x80"):  # a pickle, as torch wrote before 1.6
            raise zipfile.BadZipFile(_OTHER)
        return
    with zipfile.ZipFile(path) as archive:
        packed = [item.filename for item in archive.infolist() if item.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise FormatError(f"{path} is a compressed archive ({packed[0]}), which torch never writes. Save it by torch.save.")
        damaged = archive.testzip()
    if damaged is not None:
        raise FormatError(f"{path} is damaged: its part {damaged!r} does not match its checksum. Write it again.")


def _told(error: Exception) -> str:
    """The kind of an error, in words for those that say what the file is."""
    if isinstance(error, zipfile.BadZipFile):
        return _OTHER if _OTHER in str(error) else "its archive is cut off"
    if any(word in str(error) for word in ("Unsupported global", "Unsupported class", "Unsupported operand", "blocklisted")):
        return "it holds Python objects, which are not loaded since that could run code"
    return type(error).__name__


def write_torch(path: str | Path, document: Any) -> Path:
    """Write `document` as `torch.save` does, whole or not at all; raises `WriteError`."""
    return write_whole(path, lambda temporary: _written(path, lambda: torch.save(document, temporary)))


def write_tensors(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Path:
    """Write arrays as safetensors, whole or not at all; raises `WriteError`."""
    from safetensors.numpy import save_file

    whole = {name: np.array(array, order="C") for name, array in arrays.items()}
    return write_whole(
        path,
        lambda temporary: _written(path, lambda: save_file(whole, temporary, None if metadata is None else dict(metadata))),
    )


def _written(path: str | Path, save: Callable[[], object]) -> None:
    """Save, and tell whatever torch or safetensors raise on a full disk as a `WriteError`: there is nothing else to fail."""
    from safetensors import SafetensorError

    try:
        save()
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = disk_refusal(error) or NO_ROOM
        raise write_error(path, reason) from error


def read_tensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a safetensors file; raises `FormatError`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118  # no mapping
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}. Check the path and its permissions.") from error
    except (SafetensorError, ValueError, TypeError) as error:
        raise FormatError(f"{path} is damaged or no safetensors file ({error}). Write it again.") from error
