"""Running a user's model without leaving a trace on it: inputs of any form, outputs of any form."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpq_plugins.errors import DataError, ModelError, MPQError

Output = str | int | Callable[[Any], Tensor] | None


@dataclass(frozen=True, eq=False)
class Batch:
    """What one forward pass is given, and the labels when there are any.

    Args:
        inputs: a tensor [N, ...], a tuple of positional arguments, or a dict of keyword arguments.
        labels: class indices [N] as a tensor, list or array, or what a loss of your own reads.

    Example:
        >>> batch = mpq.Batch.of((torch.zeros(2, 3, 8, 8), [4, 1]))
        >>> len(batch), batch.labels
        (2, tensor([4, 1]))
    """

    inputs: Any
    labels: Any = None

    def __post_init__(self) -> None:
        if self.labels is not None and not isinstance(self.labels, Tensor):
            object.__setattr__(self, "labels", _as_labels(self.labels, self.inputs))

    @classmethod
    def of(cls, item: Any) -> Batch:
        """Read a loader's item: `inputs`, `(inputs, labels)`, or a dict that may hold `labels`.

        A tuple or list of two is always (inputs, labels): wrap two positional inputs as `((a, b), None)`.
        """
        if isinstance(item, Batch):
            return item
        if isinstance(item, Mapping):
            inputs = {key: value for key, value in item.items() if key != "labels"}
            return cls(inputs, item.get("labels"))
        if isinstance(item, (tuple, list)) and len(item) == 2:
            inputs, labels = item
            return cls(tuple(inputs) if isinstance(inputs, list) else inputs, labels)
        if isinstance(item, (tuple, list)):
            return cls(item[0] if len(item) == 1 else tuple(item))
        return cls(item)

    def __len__(self) -> int:
        return batch_size(self.inputs)

    def part(self, start: int, stop: int) -> Batch:
        """Its images from `start` up to `stop`; what does not have one row per image is kept whole."""
        whole = start <= 0 and stop >= len(self)
        return self if whole else self._with(lambda rows: rows[start:stop])

    def doubled(self) -> Batch:
        """Its images and then the same again; what does not have one row per image is kept as it is."""
        return self._with(lambda rows: torch.cat([rows, rows]) if isinstance(rows, Tensor) else (*rows, *rows))

    def _with(self, change: Callable[[Any], Any]) -> Batch:
        """The batch with whatever has one row per image changed."""

        def changed(value: Tensor) -> Tensor:
            of_images = value.dim() and value.shape[0] == len(self)
            return change(value) if of_images else value

        labels = self.labels
        if isinstance(labels, Tensor):
            labels = changed(labels)
        elif isinstance(labels, (list, tuple)) and len(labels) == len(self):
            labels = change(labels)
        return Batch(mapped(self.inputs, changed), labels)


def _as_labels(labels: Any, inputs: Any) -> Any:
    """Numbers as a tensor, anything else as it is."""
    found = labels
    if isinstance(labels, (int, np.integer)) and not isinstance(labels, bool):
        found = [labels] if next((tensor.shape[:1] for tensor in tensors(inputs)), ()) == (1,) else labels
    if isinstance(found, (list, tuple)) and any(isinstance(label, Tensor) for label in found):
        found = [label.tolist() if isinstance(label, Tensor) else label for label in found]
    if isinstance(found, (list, tuple, np.ndarray)):
        try:
            array = np.asarray(found)
        except ValueError:  # rows of different lengths
            return labels
        if array.dtype.kind in "iufb" and array.size:
            return torch.as_tensor(array.astype(np.int64) if array.dtype.kind in "iub" else array.astype(np.float32))
    return labels


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch on the CPU; raises `DataError` where there are none, or no numbers, or not one per image."""
    labels = batch.labels
    if labels is None:
        raise DataError(
            "the batch carries no labels, and this needs them. Yield (inputs, labels) pairs, or dicts with a 'labels' entry."
        )
    if not isinstance(labels, Tensor):
        raise DataError(
            f"the labels of a batch are no class indices but a {type(labels).__name__}: {str(labels)[:60]}. Yield a tensor [N] "
            "of whole numbers, one for each image: classes.index(name) for names."
        )
    return labels.cpu()


def batches_of(loader: Iterable[Any]) -> Iterator[Batch]:
    """Every item of `loader` as a `Batch`; raises `DataError` for a text."""
    if isinstance(loader, str):
        raise DataError(f"{loader!r} is a text, not batches. Give a DataLoader, or a list of what the model takes.")
    return (Batch.of(item) for item in loader)


def joined(batches: Sequence[Batch], least: int) -> list[Batch]:
    """The same images in batches of at least `least` where neighbours can be joined: all but the number of images equal."""
    found: list[Batch] = []
    for batch in batches:
        both = _both(found[-1], batch) if found and len(found[-1]) < least else None
        found[len(found) - (both is not None) :] = [batch if both is None else both]
    if len(found) > 1 and len(found[-1]) < least:
        both = _both(found[-2], found[-1])
        found[-2:] = found[-2:] if both is None else [both]
    return found


def _both(one: Batch, other: Batch) -> Batch | None:
    sizes = (len(one), len(other))
    try:
        labels = None if one.labels is None and other.labels is None else _chained(one.labels, other.labels, sizes)
        return Batch(_chained(one.inputs, other.inputs, sizes), labels)
    except ValueError:
        return None


def _chained(one: Any, other: Any, sizes: tuple[int, int]) -> Any:
    """Two inputs of one form, one after the other along the axis of images. Raises `ValueError` where that cannot be."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if (
            one.dtype == other.dtype
            and one.shape[1:] == other.shape[1:]
            and (one.shape[:1], other.shape[:1]) == tuple((size,) for size in sizes)
        ):
            return torch.cat([one, other])
        if torch.equal(one, other):
            return one
    elif isinstance(one, Mapping) and isinstance(other, Mapping) and one.keys() == other.keys():
        return {key: _chained(value, other[key], sizes) for key, value in one.items()}
    elif isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)) and len(one) == len(other):
        return tuple(_chained(first, second, sizes) for first, second in zip(one, other, strict=True))
    elif type(one) is type(other) and isinstance(one, (int, float, str, type(None))) and one == other:
        return one
    raise ValueError("of different forms")


def calibration_batches(items: Iterable[Any], example: Any, most: int | None = None) -> list[Batch]:
    """At most `most` items of `items` as batches that the model can take, judged by the `example`.

    Raises `DataError` without any, for tensors of another type or number of axes than the example's, and for values that are
    not finite.
    """
    found = list(itertools.islice(batches_of(items), most))
    if not found:
        raise DataError("no calibration batches were given, but activation ranges need them. Pass some (--data).")
    for index, batch in enumerate(found):
        check_like(batch.inputs, example, where=f"calibration batch {index}")
    return found


def check_like(inputs: Any, example: Any, *, where: str) -> None:
    """Refuse inputs that cannot be what the example is: other types, a missing batch axis, NaN. Raises `DataError`."""
    given, expected = list(tensors(inputs)), list(tensors(example))
    if not given:
        raise DataError(f"{where} holds no tensor but a {type(inputs).__name__}. Give inputs as the model takes them.")
    for tensor in given:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(f"{where} holds values that are not finite. Look for NaN in the images.")
    if len(given) != len(expected):
        return  # optional inputs
    for tensor, like in zip(given, expected, strict=True):
        is_type = tensor.dtype == like.dtype or not (tensor.is_floating_point() or like.is_floating_point())
        if not is_type or tensor.dim() != like.dim() or (like.numel() and not tensor.numel()):
            raise DataError(
                f"{where} has a tensor {_form(tensor)}, the example one {_form(like)}. Give batches as the example is: of its "
                "type, with the batch axis first (tensor.float(), tensor.unsqueeze(0))."
            )


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def first_batch(loader: Iterable[Any], *, purpose: str) -> Batch:
    """The first item of `loader`; raises `DataError` when there is none."""
    for batch in batches_of(loader):
        return batch
    raise DataError(f"no batches were given, but {purpose} needs them. Pass data (--data on the command line).")


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside a tensor, sequence, mapping or dataclass, depth first."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def batch_size(inputs: Any) -> int:
    """Length of the first axis of the first tensor."""
    for tensor in tensors(inputs):
        return tensor.shape[0] if tensor.dim() else 1
    raise ModelError("the example holds no tensor. Give a tensor, a tuple of tensors or a dict of tensors.")


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed, in the same nesting."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change) for item in value)
    return value


def to_device(inputs: Any, device: torch.device) -> Any:
    """`inputs` with every tensor on `device`, in the same nesting."""
    return mapped(inputs, lambda tensor: tensor.to(device))


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter or buffer lives; the CPU for a model without either."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(inputs)`, `model(*inputs)` or `model(**inputs)` by the form of the inputs, on the model's device."""
    inputs = to_device(inputs, device_of(model))
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def are_logits(output: Tensor) -> bool:
    """Whether `output` can be scores before a softmax: neither probabilities (all within 0 to 1) nor rows of length one."""
    if not output.numel() or not output.is_floating_point():
        return False
    if bool((output >= 0).all()) and bool((output <= 1).all()):
        return False
    return output.dim() != 2 or not bool((output.double().norm(dim=1) - 1).abs().max() < 1e-3)


def are_class_logits(output: Tensor) -> bool:
    """Whether `output` is [N, class] of logits, so that KL divergence of its softmax says what it does to answers."""
    return output.dim() == 2 and output.shape[1] > 1 and are_logits(output)


def select(result: Any, output: Output = None) -> Tensor:
    """The one tensor of a model's result that is compared and measured.

    `output` is a key, an index, an attribute name or a callable; None is enough when the result holds one tensor.
    Raises `ModelError` naming what there is to choose from.
    """
    if callable(output):
        chosen = output(result)
    elif output is not None:
        chosen = _pick(result, output)
    else:
        found = list(tensors(result))
        if len(found) != 1:
            raise ModelError(
                f"the model returns a {type(result).__name__} with {len(found)} tensors ({_choices(result)}). "
                'Say which one counts: output="NAME", an index or a function (--output NAME on the command line).'
            )
        chosen = found[0]
    if not isinstance(chosen, Tensor):
        raise ModelError(f"output={output!r} selects a {type(chosen).__name__}, not a tensor. Select one level deeper.")
    return chosen


def _pick(result: Any, output: str | int) -> Any:
    key = int(output) if isinstance(output, str) and output.lstrip("-").isdigit() else output
    try:
        if isinstance(result, Mapping) or isinstance(key, int):
            return result[key]
        return getattr(result, key)
    except (KeyError, IndexError, AttributeError, TypeError) as error:
        raise ModelError(f"the model's {type(result).__name__} has no output {output!r}; it has {_choices(result)}.") from error


def _choices(result: Any) -> str:
    if isinstance(result, Mapping):
        return ", ".join(map(repr, result))
    if dataclasses.is_dataclass(result):
        return ", ".join(repr(field.name) for field in dataclasses.fields(result))
    if isinstance(result, Sequence):
        return f"indices 0 to {len(result) - 1}"
    return f"a {type(result).__name__}"


@contextlib.contextmanager
def telling_failures(model: nn.Module) -> Iterator[None]:
    """Tell a failing forward pass as a `DataError`."""
    try:
        yield
    except MPQError:
        raise
    except Exception as error:
        raise DataError(
            f"the forward pass of {type(model).__name__} failed on a batch: {type(error).__name__}: {error}. "
            "Batches must hold what the example held: the same kind of inputs, images of a size the model takes."
        ) from error


@contextlib.contextmanager
def evaluating(model: nn.Module, *, fused: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode and the random state come back afterwards.

    torch's fused attention kernels call no layer of what they compute, so nothing sees those layers: they are off, unless
    `fused` asks for the module as users run it.
    """
    kernels = torch.backends.mha
    had_fused = kernels.get_fastpath_enabled()
    modes = [(module, module.training) for module in model.modules()]
    devices = [device_of(model)] if device_of(model).type == "cuda" else []
    if any(training for _, training in modes):  # setting attributes of all modules takes longer than running small ones
        model.eval()
    try:
        kernels.set_fastpath_enabled(had_fused and fused)
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        kernels.set_fastpath_enabled(had_fused)
        for module, training in modes:
            if module.training is not training:
                module.training = training
