"""How well channels tell images (or classes) apart: TF-IDF of pooled feature maps."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from mpq_plugins.errors import DataError
from mpq_plugins.model.layers import Layer
from mpq_plugins.model.run import Batch, labels_of
from mpq_plugins.proxies.features import AbstractStatistic, not_finite

Documents = Literal["images", "classes"]

# Values of a feature map that are pooled at a time: they stay in the cache, and no second feature map is made.
_N_VALUES = 2**19


def pooled(feature: Tensor, channel_axis: int) -> Tensor:  # [N, C]
    """Mean over all positions of the rectified feature map [N, ...], in float64; `channel_axis` counts from the end."""
    channels_last = feature.movedim(channel_axis, -1) if feature.dim() > 1 else feature[:, None]
    n_images = max(1, _N_VALUES // max(1, channels_last[0].numel()))
    positions = tuple(range(1, channels_last.dim() - 1))
    parts = []
    for part in torch.split(channels_last, n_images):
        rectified = part if bool(part.amin() >= 0) else part.clamp(min=0)  # Most have been through a ReLU.
        parts.append(rectified.mean(dim=positions, dtype=torch.float32) if positions else rectified)
    return torch.cat(parts).double()


def term_frequency(documents: np.ndarray) -> np.ndarray:  # [C, D]
    """Share of each channel in each document; an empty document has shares of 0."""
    totals = documents.sum(axis=0)
    return documents / np.where(totals > 0, totals, 1.0)


def tf_idf(documents: np.ndarray) -> float:
    """Separability of pooled features [C, D]: the sum over channels of TF times IDF.

    A channel's set S are the documents where it is at least at its mean; TF is the mean of its share of these documents,
    IDF = ln((D + 1) / (|S| + 1)), which is never negative. Shares are about 1 / C, so the sum does not depend on the
    number of channels, as the published mean does. Dead channels add nothing.
    """
    frequency, counts = channel_frequency(documents)
    inverse = np.log((documents.shape[1] + 1.0) / (counts + 1.0))
    return float(np.sum(frequency * inverse))


def channel_frequency(documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [C], [C]
    """TF of every channel and the number of documents where it is at least at its mean."""
    in_set = documents >= documents.mean(axis=1, keepdims=True)
    counts = in_set.sum(axis=1)
    # Rounding can lift the mean of equal values above all of them.
    return (term_frequency(documents) * in_set).sum(axis=1) / np.maximum(counts, 1), counts


@final
class PooledFeatures(AbstractStatistic):
    """Pooled features of every unit over all images: [C, N] is small, so any number of batches is exact."""

    def __init__(self, n_units: int, *, with_labels: bool) -> None:
        self._with_labels = with_labels
        self._calls: list[list[Tensor]] = [[] for _ in range(n_units)]
        self._images: list[list[np.ndarray]] = [[] for _ in range(n_units)]  # [unit][batch] of [N, C]
        self._labels: list[np.ndarray] = []

    def take(self, unit: int, layer: Layer, feature: Tensor) -> None:
        """Pool the feature map of one call."""
        n_positions = 0 if layer.kind == "Linear" else int(layer.kind[-2])
        found = pooled(feature, -1 - n_positions)
        if not bool(found.isfinite().all()):
            raise not_finite(layer, feature)
        self._calls[unit].append(found)

    def end_batch(self, batch: Batch) -> None:
        """Keep the mean over the calls of each unit, and the labels where they count."""
        for calls, images in zip(self._calls, self._images, strict=True):
            if calls:
                images.append(torch.stack(calls).mean(dim=0).cpu().numpy())
                calls.clear()
        if self._with_labels:
            self._labels.append(_labels(batch))

    def documents(self) -> list[np.ndarray]:  # [unit] of [C, D]
        """Pooled features per image, or their means per class, classes in ascending order."""
        units = [np.concatenate(images).T for images in self._images]
        if not self._with_labels:
            return units
        labels = np.concatenate(self._labels)
        classes = np.unique(labels)
        if len(classes) < 2:
            raise DataError(
                f"all {len(labels)} images have the label {classes[0]}, so there are no classes to tell apart. "
                'Shuffle the data, raise n_images, or use documents="images".'
            )
        return [np.stack([unit[:, labels == label].mean(axis=1) for label in classes], axis=1) for unit in units]


def _labels(batch: Batch) -> np.ndarray:  # [N]
    if batch.labels is None:
        raise DataError(
            'documents="classes" groups images by their labels, and these batches carry none. '
            'Give batches of (inputs, labels), or use documents="images".'
        )
    labels = labels_of(batch).detach().numpy()
    if labels.shape != (len(batch),):
        raise DataError(
            f"labels have shape {labels.shape} for {len(batch)} images. Give one class index per image, a tensor [N]."
        )
    return np.asarray(labels)
