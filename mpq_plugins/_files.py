"""Files that are either whole or absent."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpq_plugins._errors import FormatError, WriteError


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary neighbour of `path`, then move it into place; missing folders are made.

    A failure or an interruption leaves whatever stood at `path` before, and no debris beside it.
    Raises `WriteError` when the folder or the disk refuses.
    """
    path = Path(path)
    try:
        return _write_whole(path, write)
    except OSError as error:
        reason = error.strerror or str(error)
        raise WriteError(
            f"cannot write {path}: {reason}. Choose a file name in a folder that you may write to, with space left."
        ) from error


def _write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes files private; what we leave behind should have the permissions of any new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def cache_folder() -> Path:
    """Where things are kept that can be made again: `mpq-plugins` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpq-plugins"


def write_json(path: str | Path, document: Any) -> Path:
    """Write `document` as sorted, indented JSON: the same document gives the same bytes."""
    text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | Path, *, format: str) -> dict[str, Any]:
    """Read a JSON object of ours and check its `"format"`; raises `FormatError`."""
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}. Check the path and its permissions.") from error
    except ValueError as error:
        raise FormatError(
            f"{path} is not complete JSON: {error}. It was cut off or edited by hand; write it again with its producer."
        ) from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != format:
        raise FormatError(f'{path} has "format" {found!r}, expected {format!r}. Is it another kind of file?')
    return dict(document)


def check_keys(document: object, *, allowed: set[str], required: set[str], where: str) -> None:
    """Refuse unknown and missing keys by name; raises `FormatError`."""
    if not isinstance(document, dict):
        raise FormatError(f"{where} must be an object, not {type(document).__name__}.")
    unknown, missing = sorted(set(document) - allowed), sorted(required - set(document))
    if unknown:
        raise FormatError(f"{where} has unknown keys {unknown}; allowed are {sorted(allowed)}. Remove or rename them.")
    if missing:
        raise FormatError(f"{where} lacks the keys {missing}. The file is incomplete; write it again.")
