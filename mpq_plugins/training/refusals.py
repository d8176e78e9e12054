"""What training does not go on with, and how it says so."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpq_plugins.errors import DataError, TrainingError
from mpq_plugins.model.run import first_batch, labels_of
from mpq_plugins.training.recipe import TrainingRecipe

_EXPLODED = 1e9  # no weight, and no range of inputs in use, is as large


def check_loss(loss: object) -> None:
    """Raise `TrainingError` for what a user's loss cannot be."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TrainingError(f"the loss must be a scalar tensor, not {found}. Take its mean over the batch.")
    if not loss.requires_grad:
        raise TrainingError("the loss depends on no trainable parameter. Compute it from the module's result, undetached.")


def check_evaluation(evaluation: Iterable[Any] | None) -> None:
    """Raise `DataError` for evaluation data that would fail after an epoch of training."""
    if evaluation is None:
        return
    if isinstance(evaluation, Iterator):
        raise DataError(
            f"the evaluation data are a {type(evaluation).__name__}, which can be read once, but every epoch reads them. "
            "Give a list, a DataLoader, or another object that begins anew."
        )
    labels_of(first_batch(evaluation, purpose="the evaluation"))


def check_finite(module: nn.Module, when: str, recipe: TrainingRecipe, latest: Path | None) -> None:
    """Raise `TrainingError` for what an epoch broke and its losses need not show.

    The last step may leave values that are not finite; and where quantizers give zeros only, the loss stays the same while
    normalisation of nothing blows gradients and weights up.
    """
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad or not parameter.numel():
            continue
        largest = parameter.detach().abs().max().item()
        if not largest <= _EXPLODED:  # a comparison with NaN is False
            found = f"up to {largest:.1e}" if math.isfinite(largest) else "that are not finite"
            raise TrainingError(abort_text(f"{name} holds values {found} {when}", recipe, latest))


def abort_text(fact: str, recipe: TrainingRecipe, latest: Path | None) -> str:
    """Why training stops, the checkpoint it can go on from, and what to change."""
    kept = "No checkpoint was kept yet" if latest is None else f"The last good checkpoint is {latest}"
    return (
        f"{fact}. {kept}. Lower the learning rate ({recipe.learning_rate:g}), bound the gradients (clip_norm), or check the "
        "batch for values that are not finite."
    )


@contextlib.contextmanager
def telling_lone_images(where: str) -> Iterator[None]:
    """Tell torch's refusal of batch statistics of one value as a `DataError`."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise DataError(
            f"{where} has one image, and batch normalisation takes its statistics from at least two values per channel. "
            "Leave short batches out (drop_last=True of a DataLoader), or choose another batch size."
        ) from error
