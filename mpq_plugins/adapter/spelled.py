"""Operations that few file formats have, spelled in those that they have, while a module is traced for a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


@final
class Spelled(TorchFunctionMode):
    """Within it `diff` is a subtraction of slices, `mT` a transposition, and pooling that keeps an axis is told its size.

    transformers' decoders look for packed sequences by `diff`, and sum truth values, where they get no attention mask.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        spelled = _SPELLINGS.get(func)
        return func(*args, **(kwargs or {})) if spelled is None else spelled(func, *args, **(kwargs or {}))


def _diff(
    func: Callable[..., Any],
    input: Tensor,
    n: int = 1,
    dim: int = -1,
    prepend: Tensor | None = None,
    append: Tensor | None = None,
) -> Any:
    parts = [part for part in (prepend, input, append) if part is not None]
    value = torch.cat(parts, dim) if len(parts) > 1 else input
    length = value.shape[dim]
    if not 0 < n < length:  # nothing to subtract: an error or no elements, as torch has it
        return func(input, n, dim, prepend, append)
    for count in range(1, n + 1):
        later, earlier = value.narrow(dim, 1, length - count), value.narrow(dim, 0, length - count)
        value = later != earlier if value.dtype is torch.bool else later - earlier
    return value


def _summed(func: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    return func(input.long() if input.dtype is torch.bool else input, *args, **kwargs)


def _transposed(func: Callable[..., Any], input: Tensor, *owner: Any) -> Any:
    return func(input, *owner) if input.is_complex() else input.transpose(-2, -1)


def _pooled(func: Callable[..., Any], input: Tensor, output_size: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(output_size, (tuple, list)) and None in output_size:
        lengths = input.shape[-len(output_size) :]
        output_size = [int(length) if size is None else size for size, length in zip(output_size, lengths, strict=True)]
    return func(input, output_size, *args, **kwargs)


_SPELLINGS: Mapping[Any, Callable[..., Any]] = {
    torch.diff: _diff,
    torch.Tensor.diff: _diff,
    torch.cumsum: _summed,
    torch.Tensor.cumsum: _summed,
    torch.Tensor.mT.__get__: _transposed,  # type: ignore[attr-defined]  # an accessor
    torch.Tensor.mH.__get__: _transposed,  # type: ignore[attr-defined]  # an accessor
    functional.adaptive_avg_pool2d: _pooled,
    functional.adaptive_avg_pool3d: _pooled,
    functional.adaptive_max_pool2d: _pooled,
    functional.adaptive_max_pool3d: _pooled,
}
