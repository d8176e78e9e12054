"""Hidden folders for what is not whole yet; those of killed processes are cleared by the next writer."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is cleared there
    fcntl = None  # type: ignore[assignment]  # asked before each use

_PREFIX = ".mpq-partial-"


@contextlib.contextmanager
def partial_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, gone at the end; what killed processes left there goes at once. Raises `OSError`.

    A folder in use is locked. A lock ends with its process, however that ends, so that an unlocked folder is nobody's.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _clear(parent)
    folder, lock = _begin(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _close(lock)


def _clear(parent: Path) -> None:
    with os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(_PREFIX)]
    for folder in found:
        with contextlib.suppress(OSError):  # in use, or gone meanwhile
            lock = _locked(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                _close(lock)


def _begin(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_PREFIX))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another process clears it before it is locked
            lock = _locked(folder)
            if folder.exists():
                return folder, lock
            _close(lock)


def _locked(folder: Path) -> int | None:
    """The lock of a folder, None where there are no locks; raises `BlockingIOError` when another process holds it."""
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if isinstance(error, BlockingIOError):
            raise
        return None  # a file system without locks
    return lock


def _close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
