"""Locks that end with their process, however that ends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]  # asked before each use


def lock_folder(folder: Path) -> int | None:
    """Lock a folder until the descriptor is closed; None where there are no locks.

    Raises `BlockingIOError` when somebody else holds it.
    """
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


def unlock_folder(lock: int | None) -> None:
    """Give back what `lock_folder` gave."""
    if lock is not None:
        os.close(lock)


def lock_file(path: Path) -> IO[bytes] | None:
    """Lock a file, made if need be, against other processes until it is closed; None where there are no locks.

    Nobody may open it for anything else: the first to close it in this process gives the lock away.
    Forked children do not hold it, so that workers that outlive a killed process keep nobody out. Raises `BlockingIOError`.
    """
    if fcntl is None:
        return None
    try:
        file = path.open("a+b")
    except OSError:  # it cannot be written: whoever writes beside it is told then
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if isinstance(error, (BlockingIOError, PermissionError)):  # POSIX allows either
            raise BlockingIOError(error.errno, error.strerror) from error
        return None
    return file
