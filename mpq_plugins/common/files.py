"""Files that are either whole or absent."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from mpq_plugins.common.partial import partial_folder
from mpq_plugins.common.values import check_values, shown, takes
from mpq_plugins.errors import FormatError, WriteError

_DEEPEST = 64  # nested lists and objects; ours have at most a dozen
_MOST_DIGITS = 20  # of a whole number; 64 bits need no more
_LARGEST_BYTES = 2**31
# How libraries that write by themselves tell of a disk that refuses: torch, safetensors, OpenVINO, protobuf.
_REFUSALS = re.compile(
    r"no space left|file too large|read-only file system|disk quota|permission denied|\(os error \d+\)", re.IGNORECASE
)
_OF_DISKS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO))

NO_ROOM = "the disk is full, or took only a part of the file"


def write_whole(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Let `write` fill a temporary file near `path`, then move it into place; missing folders are made.

    A failure or an interruption leaves whatever stood at `path` before, and no debris beside it. What a killed process
    leaves is hidden, and the next write into the same folder removes it.
    Raises `WriteError` when the folder or the disk refuses, whichever library meets that.
    """
    path = Path(path)
    try:
        check_replaceable(path)
        with partial_folder(path.parent) as folder:
            temporary = folder / path.name  # its own name, since archives of torch hold it: the same content, the same bytes
            write(temporary)
            temporary.replace(path)
        return path
    except Exception as error:
        reason = disk_refusal(error)
        if reason is None:
            raise
        raise write_error(path, reason) from error


def write_error(path: str | Path, reason: str) -> WriteError:
    """The error for a file that cannot be written."""
    return WriteError(f"cannot write {path}: {reason}. Choose a file name in a folder that you may write to, with space left.")


def reason_of(error: WriteError) -> str:
    """Why a file could not be written, without its name and the advice."""
    return str(error) if error.__cause__ is None else disk_refusal(error.__cause__) or NO_ROOM


def disk_refusal(error: BaseException) -> str | None:
    """Why the disk or the folder refused, if that is what an error of whatever library is about; else None."""
    if isinstance(error, WriteError):
        return None  # told already
    if isinstance(error, OSError):
        return error.strerror or str(error)
    lines = [line.strip() for line in str(error).splitlines() if _REFUSALS.search(line)]
    if lines:
        return lines[0][:200].rstrip(".")
    # Of what came before only a disk counts: a file that was looked for and not there is no reason.
    causes = [cause for cause in (error.__cause__, error.__context__) if cause is not None]
    told = [cause for cause in causes if not isinstance(cause, OSError) or cause.errno in _OF_DISKS]
    return next((reason for cause in told if (reason := disk_refusal(cause))), None)


def check_replaceable(path: Path) -> None:
    """Raise `OSError` for what a file must not take the place of: folders, devices, pipes. Links are replaced, not followed."""
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "its name holds a character that no name can have")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a device or a pipe, not a file")


def check_place(path: str | Path) -> None:
    """Raise `WriteError` where it is plain beforehand that no file can be written at `path`; nothing is touched."""
    path = Path(path)
    try:
        check_replaceable(path)
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{folder} is no folder")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, f"no permission to write in {folder}, or a read-only file system")
    except OSError as error:
        raise write_error(path, error.strerror or str(error)) from error


def cache_folder() -> Path:
    """Where things are kept that can be made again: `mpq-plugins` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpq-plugins"


def write_json(path: str | Path, document: Any) -> Path:
    """Write `document` as sorted, indented JSON: the same document gives the same bytes.

    Raises `WriteError`, and `FormatError` for a document with values that JSON does not have.
    """
    try:
        text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False, default=plain_value) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} would hold what JSON cannot: {error}. Keep numbers finite and keys texts.") from error
    return write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def plain_value(value: Any) -> Any:
    """`value` as JSON has it: numbers of numpy's and torch's as Python's, mappings by text keys; anything else as its text."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_value(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_value(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return repr(value)


def read_json(path: str | Path, *, format: str) -> dict[str, Any]:
    """Read a JSON object of ours and check its `"format"`; raises `FormatError`."""
    path = Path(path)
    document = parse_json(read_bytes(path), where=str(path))
    found = document.get("format") if isinstance(document, dict) else None
    if found != format:
        raise FormatError(f'{path} has "format" {found!r}, expected {format!r}. Is it another kind of file?')
    return dict(document)


def read_bytes(path: str | Path) -> bytes:
    """The content of a file of ours, 2 GiB at most; raises `FormatError`."""
    path = Path(path)
    try:
        n_bytes = path.stat().st_size
        if n_bytes > _LARGEST_BYTES:
            raise FormatError(f"{path} has {n_bytes:,} bytes; a file of this kind is far smaller. Is it another kind of file?")
        return path.read_bytes()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}. Check the path and its permissions.") from error
    except ValueError as error:  # a NUL byte in the path
        raise FormatError(f"{str(path)!r} is no path: {error}. Give the name of a file.") from error


def parse_json(text: str | bytes, *, where: str) -> Any:
    """A JSON document whose every part can be written again; raises `FormatError`.

    Refuses what Python would take or fail on by itself: repeated keys, NaN and infinity, numbers of many digits, text that is
    no Unicode, deep nesting. A byte order mark is skipped.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        document = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
        )
        _check_depth(document)
    except RecursionError as error:
        raise FormatError(f"{where} nests its lists and objects too deeply to be read. It is no file of ours.") from error
    except ValueError as error:
        raise FormatError(
            f"{where} is not complete JSON: {error}. It was cut off or edited by hand; write it again with its producer."
        ) from error
    return document


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number that JSON has")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits is too long")
    return int(text)


def _check_depth(document: Any) -> None:
    """Refuse deep nesting, and text that cannot be encoded. Raises `ValueError`."""
    level = [document]
    for _ in range(_DEEPEST):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                item.encode()  # half of a surrogate pair raises
            elif isinstance(item, dict):
                deeper += [*item, *item.values()]
            elif isinstance(item, list):
                deeper += [part for part in item if isinstance(part, (str, dict, list))]
        if not deeper:
            return
        level = deeper
    raise ValueError(f"more than {_DEEPEST} levels of lists and objects")


def check_keys(document: object, *, allowed: set[str], required: set[str], where: str) -> None:
    """Refuse unknown and missing keys by name; raises `FormatError`."""
    if not isinstance(document, dict):
        raise FormatError(f"{where} must be an object, not {type(document).__name__}.")
    unknown, missing = sorted(set(document) - allowed), sorted(required - set(document))
    if unknown:
        raise FormatError(f"{where} has unknown keys {unknown}; allowed are {sorted(allowed)}. Remove or rename them.")
    if missing:
        raise FormatError(f"{where} lacks the keys {missing}. The file is incomplete; write it again.")


def of_kinds(document: Mapping[str, Any], kinds: Mapping[str, type], *, where: str) -> None:
    """Refuse values of another kind than their key's, as far as the keys are there; raises `FormatError`."""
    for key, kind in kinds.items():
        if key in document and not takes(kind, document[key]):
            raise FormatError(f'{where}: "{key}" must be {shown(kind)}, not {repr(document[key])[:60]}. Write the file again.')


Record = TypeVar("Record")


def read_fields(record: type[Record], document: Any, *, where: str) -> Record:
    """A dataclass of plain values from a JSON object: lists become tuples, every value is checked against its field's type.

    Raises `FormatError`.
    """
    found = dataclasses.fields(record)  # type: ignore[arg-type]  # a dataclass, which types cannot say
    missing = dataclasses.MISSING
    required = {field.name for field in found if field.default is missing and field.default_factory is missing}
    check_keys(document, allowed={field.name for field in found}, required=required, where=where)
    check_values(record, document, FormatError, where=where)
    return record(**{name: tuple(value) if isinstance(value, list) else value for name, value in document.items()})
