"""Memory that long work keeps between passes: what the C library takes back and clears anew costs as much as the passes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

_MIB = 2**20
_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
_KEEP = 2**31 - 1
_USUAL = {_MMAP: 32 * _MIB, _TRIM: 64 * _MIB}  # where glibc's own moving thresholds end in a process with large tensors

_SET_BY_USERS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")

_lock = threading.Lock()
_depth = 0


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """Hold freed memory for the next tensors, and give it back at the end.

    glibc maps large tensors anew each time, and the kernel clears every page of them: about half of a forward pass of a
    depthwise network on 32 images. Nested uses count as one. Afterwards glibc's thresholds are fixed at the values that they
    move to in a process with large tensors. Other C libraries, and thresholds set by the environment, are left alone.
    """
    global _depth
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _depth += 1
        if _depth == 1:
            _set(library, {_MMAP: _KEEP, _TRIM: _KEEP})
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _set(library, _USUAL)
                library.malloc_trim(0)


def _set(library: ctypes.CDLL, thresholds: dict[int, int]) -> None:
    for parameter, value in thresholds.items():
        if not library.mallopt(parameter, value):  # some releases refuse more than 32 MiB
            library.mallopt(parameter, _USUAL[parameter])


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in _SET_BY_USERS):
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None
