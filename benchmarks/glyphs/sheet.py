"""A picture of the data, for people who want to look."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from glyphs.data import glyphs
from glyphs.distortion import IMAGE_SIZE, Distortion
from glyphs.fonts import CLASSES
from mpq_plugins.common.files import write_whole
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import WriteError
from mpq_plugins.model.run import labels_of


def save_sheet(
    path: str | Path, *, train: bool = False, per_class: int = 8, seed: int = 0, distortion: Distortion | None = None
) -> Path:
    """A picture with a row of `per_class` samples for each class, in two columns, each row named by its character.

    Raises `WriteError` for a suffix that names no picture format.
    """
    images, labels = _samples(train, per_class, seed, distortion)
    rows = torch.stack([torch.cat(list(images[labels == label]), dim=1) for label in range(len(CLASSES))])
    n_rows = -(-len(rows) // 2)
    figure = require("matplotlib.figure", "plots").Figure(figsize=(per_class + 1.5, 0.5 * n_rows))
    known = figure.canvas.get_supported_filetypes()
    if Path(path).suffix.lstrip(".").lower() not in known:
        raise WriteError(f"{path} names no picture format. End it in .png, .svg or .pdf ({', '.join(sorted(known))} work).")
    for column, axis in enumerate(figure.subplots(1, 2)):
        part = slice(column * n_rows, (column + 1) * n_rows)
        axis.imshow(rows[part].flatten(0, 1), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([IMAGE_SIZE * (row + 0.5) for row in range(len(rows[part]))], list(CLASSES[part]), fontsize=12)
    return write_whole(path, lambda temporary: figure.savefig(temporary, dpi=90, bbox_inches="tight"))


def _samples(train: bool, per_class: int, seed: int, distortion: Distortion | None) -> tuple[Tensor, Tensor]:
    n_images = per_class * len(CLASSES)
    (batch,) = glyphs(train=train, n_images=n_images, batch_size=n_images, seed=seed, distortion=distortion)
    return batch.inputs[:, 0], labels_of(batch)
