"""Training data named on the command line: augmented, in another order in every epoch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mpq_plugins.cli.sources import ImageFolder, Size, labelled_folder, user_object
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import DataError
from mpq_plugins.model.run import Batch, batches_of
from mpq_plugins.training.epochs import seed_loader

if TYPE_CHECKING:
    from mpq_plugins.training import TrainingData


def training_data(spec: str, *, size: Size = (224, 224), batch_size: int = 128, workers: int = 4) -> TrainingData:
    """What `train` reads for `spec`.

    `digits` (shifted by up to a pixel), `imagefolder:DIR` (random crops of `size`,
    height and width, and flips, ImageNet's normalisation, loaded by `workers` processes), or `file.py:LOADER` /
    `module:LOADER`: an iterable with a length, a function without parameters that returns one, or one that takes the
    epoch's number.
    Raises `DataError` and `MissingExtraError`.
    """
    if spec == "digits":
        return lambda epoch: shifted_digits(epoch, batch_size=batch_size)
    if spec.startswith("imagefolder:"):
        loader: Iterable[Any] = _image_loader(Path(spec.partition(":")[2]), size=size, batch_size=batch_size, workers=workers)
        return loader
    found: Any = user_object(spec)
    is_function = callable(found) and not isinstance(found, Iterable)
    data: TrainingData = found() if is_function and not _takes_epoch(found) else found
    return data


def calibration_data(spec: str, n_images: int, *, size: Size = (224, 224), batch_size: int = 128) -> list[Batch]:
    """Batches of the training data, without random crops, for ranges and statistics: at least `n_images` or all there are."""
    if spec.startswith("imagefolder:"):
        items: Iterable[Any] = ImageFolder(Path(spec.partition(":")[2]), size=size, batch_size=batch_size)
    else:
        data = training_data(spec, size=size, batch_size=batch_size)
        items = data(0) if callable(data) else data
    with torch.random.fork_rng():
        torch.manual_seed(0)
        seed_loader(items)
        batches = batches_of(items)
        first = next(batches, None)
        if first is None:
            raise DataError(f"{spec} gives no batches. Check the folder or the loader.")
        return [first, *islice(batches, max(0, -(-n_images // len(first)) - 1))]


def shifted_digits(epoch: int, *, batch_size: int = 64) -> Sequence[Batch]:
    """The training digits in batches, each rolled by up to one pixel, other ones in every epoch."""
    from mpq_plugins.digits import digits, shifted

    generator = torch.Generator().manual_seed(epoch)
    return [shifted(batch, generator) for batch in digits(train=True, batch_size=batch_size)]


def _image_loader(root: Path, *, size: Size, batch_size: int, workers: int) -> Any:
    transforms = require("torchvision.transforms", "vision")
    images = labelled_folder(root, transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip())
    if len(images) < batch_size:
        raise DataError(
            f"{root} holds {len(images)} images, fewer than one batch of {batch_size}. Give a smaller --batch-size."
        )
    on_gpu = torch.cuda.is_available()
    return torch.utils.data.DataLoader(images, batch_size, shuffle=True, drop_last=True, num_workers=workers, pin_memory=on_gpu)


def _takes_epoch(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-in callables tell nothing
        return False
    return any(
        item.default is item.empty and item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD) for item in parameters
    )
