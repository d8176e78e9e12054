"""Batches in the form that passes through a network on the CPU in the least time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpq_plugins.model.run import Batch, call, device_of, evaluating, joined, mapped, tensors

# Eight images of 224 x 224: of fewer, what Python does for each call weighs; of more, what layers make is beyond the cache.
_VALUES_AT_A_TIME = 1_280_000
_WORTH_IT = 2**20  # values in all batches
_AGREEMENT = 1e-3  # of outputs, relative to the largest


def quick(model: nn.Module, batches: Sequence[Batch], *, longest: int) -> list[Batch]:
    """The same rows in the same order, a few large images at a time and with channels last where `model` takes them so.

    No batch gets more rows than `longest`. What a forward pass gives changes by rounding only. Elsewhere than on the CPU, and
    with little data, batches stay as they are.
    """
    n_values = sum(tensor.numel() for batch in batches for tensor in tensors(batch.inputs))
    if device_of(model).type != "cpu" or n_values < _WORTH_IT:
        return list(batches)
    most = min(longest, max(1, _VALUES_AT_A_TIME * sum(map(len, batches)) // n_values))
    parts = [batch.part(start, start + most) for batch in joined(batches, most) for start in range(0, len(batch), most)]
    two = parts[0].part(0, 2)
    if not _takes_any_number(model, two):
        return list(batches)
    if not _takes_channels_last(model, two):
        return parts
    return [Batch(mapped(part.inputs, _channels_last), part.labels) for part in parts]


def _takes_any_number(model: nn.Module, batch: Batch) -> bool:
    """Whether the outputs on `batch` are of its rows: some models have the number of their batch written into them."""
    try:
        with evaluating(model):
            return all(output.dim() > 0 and len(output) % len(batch) == 0 for output in tensors(call(model, batch.inputs)))
    except Exception:  # of the user's model, which says with plain batches whether they are to blame
        return False


def _takes_channels_last(model: nn.Module, batch: Batch) -> bool:
    """Whether the outputs on `batch` stay what they are: views of a flattened image fail, or mix up values."""
    inputs = mapped(batch.inputs, _channels_last)
    if all(one is other for one, other in zip(tensors(inputs), tensors(batch.inputs), strict=True)):
        return False
    try:
        with evaluating(model):
            pairs = zip(tensors(call(model, inputs)), tensors(call(model, batch.inputs)), strict=True)
            return all(_agree(found, expected) for found, expected in pairs)
    except Exception:  # of the user's model, which says with plain batches whether they are to blame
        return False


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((found.double() - expected.double()).abs() <= _AGREEMENT * largest).all())


def _channels_last(image: Tensor) -> Tensor:
    """An image stored channel by channel for each pixel; anything else as it is."""
    is_image = image.dim() == 4 and image.shape[1] > 1 and image.is_floating_point()
    return image.contiguous(memory_format=torch.channels_last) if is_image else image
