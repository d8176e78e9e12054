"""Accuracy of anything that maps inputs to logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mpq_plugins._errors import DataError
from mpq_plugins._model import Output, batches_of, call, evaluating, select


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


def labels_of(labels: Tensor | None) -> Tensor:
    """The labels of a batch on the CPU; raises `DataError` when there are none."""
    if labels is None:
        raise DataError(
            "the batch carries no labels, and this needs them. Yield (inputs, labels) pairs, or dicts with a 'labels' entry."
        )
    return labels.cpu()
