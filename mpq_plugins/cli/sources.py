"""Models, weights and data named on the command line."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import nn

from mpq_plugins.common.plugins import require
from mpq_plugins.common.tensor_files import read_torch
from mpq_plugins.common.text import literal
from mpq_plugins.errors import DataError, FormatError, ModelError, MPQError
from mpq_plugins.model.check import plain_model, unwrapped
from mpq_plugins.model.run import Batch

_MARGIN = 256 / 224  # of the resized image around the crop, in ImageNet's evaluation
Size = tuple[int, int]  # height, width


def load_model(spec: str, weights: str | Path | None = None) -> nn.Module:
    """The float model that `spec` names, in evaluation mode, with `weights` loaded when given.

    `torchvision:resnet18`, `timm:NAME`, `path/to/file.py:build` or `package.module:build`, where build is a callable that
    returns an `nn.Module`, or is one. Options follow a question mark: `torchvision:resnet18?num_classes=10`.
    Raises `ModelError` and `MissingExtraError`.
    """
    name, _, query = spec.partition("?")
    options = {key: literal(value) for key, value in parse_qsl(query)}
    source, colon, target = name.rpartition(":")
    if not colon:
        raise ModelError(
            f"{spec!r} names no model. Write torchvision:NAME, timm:NAME, path/to/file.py:BUILD or package.module:BUILD."
        )
    if source == "torchvision":
        model = _built(lambda: require("torchvision", "vision").models.get_model(target, weights=None, **options), spec)
    elif source == "timm":
        model = _built(lambda: require("timm", "timm").create_model(target, pretrained=False, **options), spec)
    else:
        found = _attribute(source, target, ModelError)
        model = found if isinstance(found, nn.Module) else _built(lambda: found(**options), spec)
    model = unwrapped(model)
    if weights is not None:
        load_weights(model, weights)
    return plain_model(model).eval()


def _built(build: Callable[[], Any], spec: str) -> nn.Module:
    try:
        # Without a weights file the weights are random: the same ones each time, so that results can be repeated.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build()
    except MPQError:
        raise
    except Exception as error:  # Whatever the user's own code, or another library's, raises.
        raise ModelError(
            f"building the model {spec} failed: {_told(error)}. Check its name, its options and its code."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} gives a {type(model).__name__}, not a torch.nn.Module. Point to a function that returns one.")
    return model


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a state dict into `model`, strictly; nothing is executed from the file (`weights_only=True`).

    Reads what `torch.save(model.state_dict())` wrote, or a `.safetensors` file; a dict with `state_dict` or `model` inside is
    unwrapped, prefixes `module.` and `_orig_mod.` removed. Raises `ModelError` and leaves the model untouched.
    """
    path = Path(path)
    try:
        is_safe = path.suffix == ".safetensors"
        state = require("safetensors.torch", "all").load_file(str(path)) if is_safe else read_torch(path)
    except OSError as error:
        raise ModelError(f"cannot read the weights {path}: {error.strerror or error}. Check the path.") from error
    except FormatError as error:
        raise ModelError(
            f"the weights cannot be loaded safely: {error} Save them as torch.save(model.state_dict(), path)."
        ) from error
    except MPQError:
        raise
    except Exception as error:
        reason = str(error).split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        raise ModelError(
            f"the weights {path} cannot be loaded safely: {reason}. Save them again as torch.save(model.state_dict(), path)."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state:
        raise ModelError(f"{path} holds a {type(state).__name__}, not a state dict. Save model.state_dict().")
    state = {str(key).removeprefix("_orig_mod.").removeprefix("module."): value for key, value in state.items()}
    _check_state(model, state, path)
    model.load_state_dict(state)


def _check_state(model: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    expected = model.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    wrong = [
        f"{key}: {tuple(getattr(state[key], 'shape', ()))} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and isinstance(value, torch.Tensor) and getattr(state[key], "shape", None) != value.shape
    ]
    if missing or unexpected or wrong:
        raise ModelError(
            f"{path} does not fit {type(model).__name__}: {len(missing)} keys missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, {len(wrong)} of another shape {wrong[:3]}. "
            "Build the model with the options it was trained with."
        )


def load_data(spec: str, *, input_shape: tuple[int, ...] | None = None, batch_size: int = 32) -> Iterable[Any]:
    """Batches of the data that `spec` names, in a fixed order; can be iterated again.

    `digits` (scikit-learn's handwritten digits, 1x8x8), `imagefolder:DIR` (torchvision's
    layout, one folder a class; resized and centre-cropped to `input_shape` [batch, channels, height, width], ImageNet
    normalisation), or `file.py:loader` / `package.module:loader`, a callable or an iterable of items that `Batch.of` reads.
    Raises `DataError` and `MissingExtraError`.
    """
    if spec == "digits":
        from mpq_plugins.digits import digits

        return digits(train=False, batch_size=batch_size)
    if spec.startswith("imagefolder:"):
        root = Path(spec.partition(":")[2])
        return ImageFolder(root, size=image_size(input_shape), batch_size=batch_size)
    return UserLoader(user_object(spec), spec)


def user_object(spec: str) -> Any:
    """What `file.py:NAME` or `module:NAME` points to; raises `DataError`."""
    source, colon, target = spec.rpartition(":")
    if not colon:
        raise DataError(f"{spec!r} names no data. Write digits, imagefolder:DIR, path/to/file.py:LOADER or module:LOADER.")
    return _attribute(source, target, DataError)


class UserLoader:
    """The items of a user's iterable, or of what a user's function returns, called anew for every pass.

    Whatever that code raises is a `DataError` with the line it comes from.
    """

    def __init__(self, source: Any, spec: str) -> None:
        self._source = source
        self._spec = spec

    def __iter__(self) -> Iterator[Any]:
        iterator, end = self._tried(self._iterator), object()
        while (item := self._tried(lambda: next(iterator, end))) is not end:
            yield item

    def _iterator(self) -> Iterator[Any]:
        is_function = callable(self._source) and not isinstance(self._source, Iterable)
        items = self._source() if is_function else self._source
        if not isinstance(items, Iterable):
            raise DataError(
                f"{self._spec} gives a {type(items).__name__}, not batches. Point to an iterable of batches, or to a "
                "function that returns one."
            )
        return iter(items)

    def _tried(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except MPQError:
            raise
        except Exception as error:
            raise DataError(f"loading the data {self._spec} failed: {_told(error)}. Check that code.") from error


def image_size(input_shape: tuple[int, ...] | None) -> Size:
    """Height and width of the images that an input [batch, 3, height, width] takes; raises `DataError` for other inputs."""
    if input_shape is None:
        return 224, 224
    if len(input_shape) != 4 or input_shape[1] != 3:
        shape = "x".join(map(str, input_shape))
        raise DataError(
            f"an image folder gives images of 3 channels [batch, 3, height, width], the input is {shape}. Give --input such as "
            "1x3x224x224, or a loader of your own (--data file.py:LOADER)."
        )
    return input_shape[2], input_shape[3]


def labelled_folder(root: Path, *steps: Any) -> Any:
    """torchvision's dataset of an image folder: the `steps`, then ImageNet's normalisation. Raises `DataError`."""
    datasets, transforms = require("torchvision.datasets", "vision"), require("torchvision.transforms", "vision")
    normalised = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    try:
        return datasets.ImageFolder(str(root), transforms.Compose([*steps, transforms.ToTensor(), normalised]))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{root} is no image folder: {str(error).rstrip('.')}. It needs one sub-folder of images for each class."
        ) from error


class _Covering:
    """Resizes an image, its proportions kept, so that it covers height and width with ImageNet's margin."""

    def __init__(self, height: int, width: int) -> None:
        self._height, self._width = round(height * _MARGIN), round(width * _MARGIN)

    def __call__(self, image: Any) -> Any:
        factor = max(self._height / image.height, self._width / image.width)
        size = [max(self._height, round(image.height * factor)), max(self._width, round(image.width * factor))]
        return require("torchvision.transforms.functional", "vision").resize(image, size)


class ImageFolder:
    """Batches of an image folder with ImageNet's evaluation preprocessing, images of all classes mixed by a fixed seed."""

    def __init__(self, root: Path, *, size: Size, batch_size: int) -> None:
        transforms, (height, width) = require("torchvision.transforms", "vision"), size
        resized = transforms.Resize(round(height * _MARGIN)) if height == width else _Covering(height, width)
        self._images = labelled_folder(root, resized, transforms.CenterCrop(size))
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(self._images), generator=generator).tolist()
        for start in range(0, len(order), self._batch_size):
            images, labels = zip(*map(self._image, order[start : start + self._batch_size]), strict=True)
            yield Batch(torch.stack(images), torch.tensor(labels))

    def _image(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            image, label = self._images[index]
        except Exception as error:  # Image libraries raise errors of many kinds for damaged files.
            path = self._images.samples[index][0]
            raise DataError(f"the image {path} cannot be read: {error}. Remove or replace it.") from error
        return image, label


def example_input(shape: tuple[int, ...]) -> torch.Tensor:
    """A normal random input of a given shape, for discovery and export when there are no data."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def parse_shape(text: str) -> tuple[int, ...]:
    """`1x3x224x224` -> (1, 3, 224, 224); raises `ModelError`."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or any(size < 1 for size in shape):
        raise ModelError(f"{text!r} is no input shape. Write batch and sizes joined by x, such as 1x3x224x224.")
    return shape


def _attribute(source: str, name: str, error_type: type[Exception]) -> Any:
    """`name` from a Python file or a module."""
    try:
        module = _module_of_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:  # Importing runs the user's code, which may raise anything.
        told = str(error) if isinstance(error, (ImportError, OSError, SyntaxError)) else _told(error)
        raise error_type(f"cannot import {source}: {told}. Give an existing file.py or an importable module.") from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        public = [attribute for attribute in vars(module) if not attribute.startswith("_")]
        raise error_type(f"{source} has no {name!r}; it has {', '.join(public[:10])}.") from error


def _told(error: Exception) -> str:
    """The error of code that is not ours, with the line it comes from."""
    lines = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
    return f"{type(error).__name__}: {error}".rstrip(": .") + place


def _module_of_file(path: Path) -> ModuleType:
    if not path.exists():
        raise OSError(f"{path} does not exist")
    name = f"mpq_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
