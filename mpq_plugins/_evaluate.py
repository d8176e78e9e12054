"""Accuracy of anything that maps inputs to logits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpq_plugins._errors import DataError, ModelError
from mpq_plugins._model import Output, batches_of, call, evaluating, select, tensors

if TYPE_CHECKING:
    from mpq_plugins._adapter import AbstractAdapter


def accuracy(model: nn.Module, batches: Iterable[Any], *, output: Output = None) -> float:
    """Share of images whose largest logit is at their label; `output` selects the logits [N, classes] (see `select`).

    Raises `DataError` when a batch has no labels or there is no batch.
    """
    n_right = n_images = 0
    with evaluating(model):
        for batch in batches_of(batches):
            labels = labels_of(batch.labels)
            logits = select(call(model, batch.inputs), output)
            n_right += int((logits.argmax(dim=1).cpu() == labels).sum())
            n_images += len(labels)
    if not n_images:
        raise DataError("accuracy needs at least one batch, and there was none. Pass labelled data.")
    return n_right / n_images


def exported_accuracy(adapter: AbstractAdapter, path: str | Path, batches: Iterable[Any], *, output: Output = None) -> float:
    """The same of an exported file, run by the target's runtime with its exact semantics.

    `output` selects among the file's outputs, which have only an order: an index, or a callable that takes the list.
    """
    n_right = n_images = 0
    for batch in batches_of(batches):
        labels = labels_of(batch.labels)
        results = [torch.from_numpy(array) for array in adapter.run(path, batch.inputs)]
        logits = select(results, output if callable(output) or isinstance(output, int) else None)
        n_right += int((logits.argmax(dim=1) == labels).sum())
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


def labels_of(labels: Tensor | None) -> Tensor:
    """The labels of a batch on the CPU; raises `DataError` when there are none."""
    if labels is None:
        raise DataError(
            "the batch carries no labels, and this needs them. Yield (inputs, labels) pairs, or dicts with a 'labels' entry."
        )
    return labels.cpu()
