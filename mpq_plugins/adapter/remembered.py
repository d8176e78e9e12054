"""A quantized weight that is computed once for many forward passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, final

from torch import Tensor, nn


@final
class Remembered:
    """`quantize` for one weight tensor without gradients: it runs again only when the weight or its quantizer changed."""

    def __init__(self, quantize: Callable[[Any], Any], quantizer: nn.Module) -> None:
        self._quantize, self._quantizer = quantize, quantizer
        self._weight: Any = None  # held, so that no other tensor gets its memory
        self._versions: list[int] = []
        self._found: Any = None

    def __call__(self, weight: Any) -> Any:
        """The quantized weight."""
        if self._weight is None or not _is_same(weight, self._weight) or self._versions != self._versions_now(weight):
            self._found = self._quantize(weight)
            self._weight, self._versions = weight, self._versions_now(weight)  # now: a first call may set up the quantizer
        return self._found

    def _versions_now(self, weight: Tensor) -> list[int]:
        return [tensor._version for tensor in (weight, *self._quantizer.parameters(), *self._quantizer.buffers())]


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


@contextlib.contextmanager
def remembered(quantizers: Iterable[nn.Module]) -> Iterator[None]:
    """Without gradients: let each of `quantizers`, which take one weight, compute anew only what changed since the last call.

    Those whose forward pass is replaced already stay as they are.
    """
    chosen = {id(quantizer): quantizer for quantizer in quantizers if "forward" not in vars(quantizer)}.values()
    try:
        for quantizer in chosen:
            quantizer.forward = Remembered(partial(type(quantizer).forward, quantizer), quantizer)
        yield
    finally:
        for quantizer in chosen:
            vars(quantizer).pop("forward", None)
