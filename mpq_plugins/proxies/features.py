"""One forward pass per batch, each unit's feature map handed over as soon as it is final."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from mpq_plugins.common.progress import track
from mpq_plugins.errors import DataError, ModelError
from mpq_plugins.model.layers import Layer
from mpq_plugins.model.run import Batch, batches_of, call, evaluating, telling_failures
from mpq_plugins.model.watch import FeatureWatch
from mpq_plugins.space.space import Space


class AbstractStatistic(abc.ABC):
    """What is kept of the feature maps; they themselves are freed as the forward pass goes on."""

    @abc.abstractmethod
    def take(self, unit: int, layer: Layer, feature: Tensor) -> None:
        """Take in the feature map [N, ...] of one call of a unit's last layer."""

    @abc.abstractmethod
    def end_batch(self, batch: Batch) -> None:
        """Take note that all feature maps of `batch` have been seen."""


def observe(model: nn.Module, space: Space, batches: Iterable[Any], statistic: AbstractStatistic, *, n_images: int) -> int:
    """Show `statistic` the feature maps of at most the first `n_images` images; returns how many there were.

    A unit is seen at its last layer in the order of the forward pass: tied layers mostly end in one residual add, and a
    feature map counts once. The model is left as it was found.
    Raises `DataError` without batches or when the model fails on one, `ModelError` for a layer that never ran.
    """
    seen: set[int] = set()
    n_seen = 0
    for batch in track(first_images(batches, n_images), "images through the model"):
        seen |= _observe_batch(model, space, batch, statistic)
        statistic.end_batch(batch)
        n_seen += len(batch)
    unseen = [unit.layers[-1] for index, unit in enumerate(space.units) if index not in seen]
    if unseen:
        raise ModelError(
            f"{', '.join(unseen)} did not run on these batches, though the example ran it. Give batches that take the same "
            "path through the model, or exclude the layer from the search."
        )
    return n_seen


def first_images(batches: Iterable[Any], n_images: int) -> Iterator[Batch]:
    """Batches up to `n_images` images in all, the last one cut to fit; no batch is drawn beyond that.

    Raises `DataError` when there is none.
    """
    if n_images < 1:
        raise DataError(f"n_images is {n_images}, but a score needs at least one image. Leave it at its default.")
    left = n_images
    for batch in batches_of(batches):
        n_taken = min(left, len(batch))
        if n_taken:
            yield batch.part(0, n_taken)
        left -= n_taken
        if left == 0:
            return
    if left == n_images:
        raise DataError("no batches were given, but this score needs images. Pass data (--data on the command line).")


def _observe_batch(model: nn.Module, space: Space, batch: Batch, statistic: AbstractStatistic) -> set[int]:
    unit_of = {unit.layers[-1]: index for index, unit in enumerate(space.units)}
    layers = {layer.name: layer for layer in space.layers}
    seen: set[int] = set()

    def hand_over(names: tuple[str, ...], feature: Tensor) -> None:
        for name in names:
            seen.add(unit_of[name])
            statistic.take(unit_of[name], layers[name], _per_image(feature, len(batch), name))

    watch = FeatureWatch(model, [layers[name] for name in unit_of], hand_over)
    with telling_failures(model), evaluating(model), watch:
        call(model, batch.inputs)
    return seen


def _per_image(feature: Tensor, n_images: int, layer: str) -> Tensor:
    """The feature map as [N, ...]; models that cut images into windows stack them on the first axis, image by image."""
    if feature.dim() and feature.shape[0] == n_images:
        return feature
    if feature.dim() == 0 or feature.shape[0] % n_images:
        raise ModelError(
            f"the feature map of {layer} has shape {tuple(feature.shape)} for {n_images} images, so the images cannot be "
            "told apart. Exclude the layer from the search, or give the model its batch on the first axis."
        )
    return feature.reshape(n_images, feature.shape[0] // n_images, *feature.shape[1:])


def not_finite(layer: Layer, feature: Tensor) -> DataError:
    """The error for a feature map whose statistics overflowed or were not numbers."""
    n_bad = int((~feature.isfinite()).sum())
    if n_bad == 0:
        return DataError(
            f"the activations of {layer.name} reach {float(feature.abs().max()):.3g}: too large for statistics in float32. "
            "Check the preprocessing of the images and the weights of the model."
        )
    n_nan = int(feature.isnan().sum())
    return DataError(
        f"the activations of {layer.name} are not finite: {n_nan} NaN and {n_bad - n_nan} infinite of "
        f"{feature.numel()} values. Look for NaN in the images and the weights, or run the model in float32."
    )
