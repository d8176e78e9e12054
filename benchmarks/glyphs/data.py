"""The data set: batches of distorted glyphs, the same for the same seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from glyphs.distortion import Distortion, softened
from glyphs.fonts import CLASSES, FONTS, HELD_OUT_FONTS, masters
from mpq_plugins.common.progress import track
from mpq_plugins.errors import DataError
from mpq_plugins.model.run import Batch

_CHUNK = 512
_PART_SEEDS = {True: 1_000_003, False: 2_000_003}
_TRAIN_FONTS = tuple(font for font in FONTS if font not in HELD_OUT_FONTS)


def glyphs(
    *,
    train: bool,
    n_images: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    distortion: Distortion | None = None,
) -> Sequence[Batch]:
    """Batches of images [N, 1, 32, 32] in [-1, 1] (1 is the darkest) with labels that index `CLASSES`.

    20,000 training or 4,000 test images unless `n_images` says otherwise; each class is equally frequent up to one
    image, in random order. Test images draw other distortions, and from four fonts that training images never use
    as well. Another `seed` gives other images of the same kind. Rendering 20,000 takes four seconds of one core.
    """
    generator = torch.Generator().manual_seed(_PART_SEEDS[train] + seed * 7_919)
    n = n_images if n_images is not None else 20_000 if train else 4_000
    if n < 1:
        raise DataError(f"n_images is {n}, and a data set needs at least 1. Leave it out for 20,000 or 4,000.")
    labels = (torch.arange(n) % len(CLASSES))[torch.randperm(n, generator=generator)]
    images = _images(labels, _TRAIN_FONTS if train else FONTS, distortion or Distortion(), generator)
    return [Batch(x, y) for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)]


def _images(labels: Tensor, fonts: tuple[str, ...], distortion: Distortion, generator: torch.Generator) -> Tensor:
    ink, classes = masters(fonts)
    ink = softened(ink)  # Blurred ink has a slope, on which a threshold sets the stroke's width.
    chosen = _choose(labels, classes, generator)
    intruders = torch.randint(len(ink), (len(labels),), generator=generator)
    pairs = list(zip(torch.split(chosen, _CHUNK), torch.split(intruders, _CHUNK), strict=True))
    chunks = [distortion(ink[own], ink[other], generator) for own, other in track(pairs, "rendering glyphs")]
    return torch.cat(chunks)


def _choose(labels: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """For each label the index of a random master of that class."""
    order = classes.argsort(stable=True)
    counts = classes.bincount(minlength=len(CLASSES))
    starts = counts.cumsum(0) - counts
    within = (torch.rand(len(labels), generator=generator) * counts[labels]).long()
    return order[starts[labels] + within]
