"""Copies of NNCF's graphs of models that read an accessor of a tensor, such as `x.mT`."""

from __future__ import annotations

import contextlib
import copyreg
from collections.abc import Iterator
from typing import Any

import torch

_KIND = type(torch.Tensor.mT)


@contextlib.contextmanager
def copyable_accessors() -> Iterator[None]:
    """Let `copy.deepcopy` take accessors by name, as it takes functions; NNCF keeps them in the graphs that it copies."""
    before = copyreg.dispatch_table.get(_KIND)
    copyreg.dispatch_table[_KIND] = _by_name
    try:
        yield
    finally:
        copyreg.dispatch_table.pop(_KIND)
        if before is not None:
            copyreg.dispatch_table[_KIND] = before


def _by_name(accessor: Any) -> tuple[Any, tuple[Any, str]]:
    return getattr, (accessor.__objclass__, accessor.__name__)
