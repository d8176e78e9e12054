"""How dependent the feature maps of units are: the ORM matrix, from Gram matrices built on the fly."""

from __future__ import annotations

from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from mpq_plugins.errors import DataError
from mpq_plugins.model.layers import Layer
from mpq_plugins.model.run import Batch
from mpq_plugins.proxies.features import AbstractStatistic, not_finite

Estimator = Literal["debiased", "biased"]

# A Gram matrix in float32 is good to about 1e-6 of its size: what varies less between images is rounding.
_NOISE = 1e-6
# Columns per float32 product: long enough for full speed, short enough to lose little before the sum in float64.
_N_COLUMNS = 2**14
# Up to this length a product in float64 costs next to nothing, and deep layers, which are short, differ least between images.
_N_EXACT = 2**15


def gram(feature: Tensor) -> Tensor:  # [N, N]
    """Inner products of the images' feature maps [N, ...], in float64.

    Reads the feature map once and copies of it no more than a part at a time, if it is laid out densely.
    """
    if feature.dim() == 4 and feature.is_contiguous(memory_format=torch.channels_last):
        feature = feature.permute(0, 2, 3, 1)  # Any order of the columns gives the same products.
    columns = feature.flatten(1) if feature.dim() > 1 else feature[:, None]
    total = torch.zeros(len(feature), len(feature), dtype=torch.float64, device=feature.device)
    dtype = torch.float64 if columns.shape[1] <= _N_EXACT else torch.promote_types(columns.dtype, torch.float32)
    for part in torch.split(columns, _N_COLUMNS, dim=1):
        wide = part.to(dtype)
        total += wide @ wide.T
    return total


def centred(gram: Tensor) -> Tensor:
    """H K H with H = I - 11'/N, for Gram matrices [..., N, N]: columns of the features centred."""
    rows = gram.mean(dim=-1, keepdim=True)
    return gram - rows - rows.transpose(-1, -2) + gram.mean(dim=(-2, -1), keepdim=True)


def u_centred(gram: Tensor) -> Tensor:
    """Gram matrices [..., N, N] centred so that their products estimate HSIC without bias; N >= 4.

    Székely and Rizzo, "Partial distance correlation", Annals of Statistics 2014: diagonal dropped, means over the
    N - 2 other images.
    """
    n_images = gram.shape[-1]
    off_diagonal = ~torch.eye(n_images, dtype=torch.bool, device=gram.device)
    kept = gram * off_diagonal
    means = kept.sum(dim=-1, keepdim=True) / (n_images - 2)
    means = means - means.sum(dim=-2, keepdim=True) / (2 * (n_images - 1))
    return (kept - means - means.transpose(-1, -2)) * off_diagonal


@final
class Dependence(AbstractStatistic):
    """HSIC between all units, averaged over batches, each weighted by its number of images.

    Between batches no inner products are taken, so memory is one N x N matrix per unit for the N of a batch. The debiased
    estimate does not depend on the batch size in expectation; the biased one has the bias of the batch size.
    Batches of fewer than four images (two for the biased estimate) say nothing and are passed over.
    """

    def __init__(self, n_units: int, estimator: Estimator) -> None:
        self._estimator = estimator
        self._grams: list[Tensor | None] = [None] * n_units
        self._hsic = np.zeros((n_units, n_units))  # [unit, unit]
        self._squared_size = np.zeros(n_units)  # of the matrices before centring, weighted alike
        self.n_used = 0

    @property
    def least_batch(self) -> int:
        """The fewest images that the estimate is defined for."""
        return 4 if self._estimator == "debiased" else 2

    def take(self, unit: int, layer: Layer, feature: Tensor) -> None:
        """Add to the unit's Gram matrix; several calls count as one longer feature map."""
        found = gram(feature)
        if not bool(found.isfinite().all()):
            raise not_finite(layer, feature)
        held = self._grams[unit]
        self._grams[unit] = found if held is None else held + found

    def end_batch(self, batch: Batch) -> None:
        """Turn the batch's Gram matrices into HSIC and forget them."""
        grams, self._grams = self._grams, [None] * len(self._grams)
        n_images = len(batch)
        if n_images < self.least_batch or any(held is None for held in grams):
            return
        stacked = torch.stack([held for held in grams if held is not None])
        centre, n_pairs = (u_centred, n_images * (n_images - 3)) if self.least_batch == 4 else (centred, (n_images - 1) ** 2)
        rows = centre(stacked).flatten(1)
        weight = n_images / n_pairs
        self._hsic += weight * (rows @ rows.T).cpu().numpy()
        self._squared_size += weight * stacked.square().sum(dim=(1, 2)).cpu().numpy()
        self.n_used += n_images

    def orm(self) -> np.ndarray:  # [unit, unit]
        """ORM of all pairs of units: 1 on the diagonal, exactly.

        A feature map that is the same for all images follows from any other, so its ORM is 1 with every unit.
        """
        if self.n_used == 0:
            raise DataError(
                f"the {self._estimator} estimate needs batches of at least {self.least_batch} images, and none was that "
                "large. Give larger batches."
            )
        own = np.diag(self._hsic)
        constant = own <= _NOISE**2 * self._squared_size
        scale = np.sqrt(np.where(constant, 1.0, own))
        matrix = self._hsic / scale[:, None] / scale[None, :]
        matrix[constant, :] = matrix[:, constant] = 1.0
        np.fill_diagonal(matrix, 1.0)
        return matrix
