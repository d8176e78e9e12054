"""Hidden folders for what is not whole yet; those of killed processes are cleared by the next writer."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mpq_plugins.common.locks import lock_folder, unlock_folder

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
        unlock_folder(lock)


def _clear(parent: Path) -> None:
    with os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if entry.name.startswith(_PREFIX)]
    for folder in found:
        with contextlib.suppress(OSError):  # in use, or gone meanwhile
            lock = lock_folder(folder)
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                unlock_folder(lock)


def _begin(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=_PREFIX))
        with contextlib.suppress(BlockingIOError, FileNotFoundError):  # another process clears it before it is locked
            lock = lock_folder(folder)
            if folder.exists():
                return folder, lock
            unlock_folder(lock)
