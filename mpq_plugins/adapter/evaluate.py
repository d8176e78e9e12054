"""Accuracy of anything that maps inputs to logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpq_plugins.errors import DataError, ModelError
from mpq_plugins.model.run import Batch, Output, batches_of, call, evaluating, labels_of, select, tensors

if TYPE_CHECKING:
    from mpq_plugins.adapter.base import AbstractAdapter


def accuracy(model: nn.Module, batches: Iterable[Any], *, output: Output = None) -> float:
    """Share of images whose largest logit is at their label; `output` selects the logits [N, classes] (see `select`).

    Raises `DataError` when a batch has no labels or there is no batch.
    """
    with evaluating(model, fused=True):
        return _share_of_right(batches, lambda batch: select(call(model, batch.inputs), output))


def exported_accuracy(adapter: AbstractAdapter, path: str | Path, batches: Iterable[Any], *, output: Output = None) -> float:
    """The same of an exported file, run by the target's runtime with its exact semantics.

    `output` selects among the file's outputs, which have only an order: an index, or a callable that takes the list.
    """
    chosen = output if callable(output) or isinstance(output, int) else None

    def logits_of(batch: Batch) -> Tensor:
        return select([torch.from_numpy(array) for array in adapter.run(path, batch.inputs)], chosen)

    return _share_of_right(batches, logits_of)


def _share_of_right(batches: Iterable[Any], logits_of: Callable[[Batch], Tensor]) -> float:
    n_right = n_images = 0
    for batch in batches_of(batches):
        logits = _logits(logits_of(batch))
        labels = class_indices(batch, logits)
        n_right += int((logits.argmax(dim=1).cpu() == labels).sum())
        n_images += len(labels)
    if not n_images:
        raise DataError("accuracy needs at least one batch, and there was none. Pass labelled data.")
    return n_right / n_images


def output_index(module: nn.Module, inputs: Any, output: Output) -> int | None:
    """Where the output that counts stands among those of an exported file: depth first in the module's result, as there.

    None when the result holds one tensor. Raises `ModelError` where `output` selects nothing, or a tensor made from others.
    """
    with evaluating(module):
        result = call(module, inputs)
    found = list(tensors(result))
    chosen = select(result, output)
    for index, tensor in enumerate(found):
        if tensor is chosen:
            return index if len(found) > 1 else None
    raise ModelError(f"output={output!r} gives a tensor that is not among the model's outputs, so no exported file has it.")


def _logits(logits: Tensor) -> Tensor:
    if logits.dim() != 2:
        raise DataError(
            f"accuracy needs logits [N, classes], and the output has shape {tuple(logits.shape)}. Select another output "
            "(--output on the command line), or measure without accuracy."
        )
    return logits


def class_indices(batch: Batch, logits: Tensor) -> Tensor:  # [N]
    """The labels of a batch as what logits [N, classes] are compared with; raises `DataError` for others."""
    labels = labels_of(batch)
    if labels.is_floating_point() or labels.shape != logits.shape[:1]:
        raise DataError(
            f"labels have shape {tuple(labels.shape)} and type {str(labels.dtype).removeprefix('torch.')} for logits of shape "
            f"{tuple(logits.shape)}. Give one class index per image, a tensor [N] of whole numbers."
        )
    return labels
