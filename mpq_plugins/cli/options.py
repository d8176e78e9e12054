"""Objects that the options of the command line name."""

from __future__ import annotations

import errno
import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_plugins.adapter.base import AbstractAdapter
from mpq_plugins.common.files import check_place
from mpq_plugins.common.plugins import make
from mpq_plugins.common.text import values_of, words_of
from mpq_plugins.errors import DataError, ModelError, WriteError
from mpq_plugins.space.precision import menu

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins.model.run import Batch


def cache_of(options: Namespace) -> Path | None:
    """Where measurements are kept: the folder asked for, or the user's cache where that can be written."""
    from mpq_plugins.common.files import cache_folder

    if options.no_cache or options.cache:
        return None if options.no_cache else Path(options.cache)
    folder = cache_folder() / "measurements"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write there")
    except OSError as error:
        print(f"note: no measurements are kept in {folder}: {error.strerror}. See --cache.", file=sys.stderr)
        return None
    return folder


def model_of(options: Namespace, inputs: Any = None) -> tuple[nn.Module, Any]:
    """The model and one example input: of the shape asked for, else `inputs`, else of the data."""
    from mpq_plugins.cli.sources import load_model

    model = load_model(options.model, options.weights)
    # An exported module brings its own weights.
    if options.weights is None and options.verb != "export" and options.model.startswith(("torchvision:", "timm:")):
        print("note: no --weights given, so the weights are random", file=sys.stderr)
    model = on_device(model, options.device)
    example = _example_of(options) if inputs is None or options.input else inputs
    if not options.negative_padding:
        return model, example
    from mpq_plugins.training import with_negative_padding

    padded = with_negative_padding(model, example)
    if not padded.rewritten:
        print("note: --negative-padding finds no hard swish that only convolutions and linear layers read", file=sys.stderr)
    return padded.model, example


def on_device(model: nn.Module, name: str) -> nn.Module:
    """The model on a device of torch's by name; raises `ModelError` for one that is not there."""
    import torch

    try:
        return model.to(torch.device(name))
    except Exception as error:  # torch raises errors of many kinds for devices
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise ModelError(
            f"the device {name!r} cannot be used: {reason}. Give cpu, cuda or cuda:1, or leave --device out."
        ) from error


def check_outputs(options: Namespace) -> None:
    """Refuse places that cannot be written, to write over what the command reads, or two outputs into one file.

    Done before the long work. Tells which files are replaced.
    """
    read: dict[Path, str] = {}
    written: dict[Path, str] = {}
    for name in ("weights", "teacher_weights", "bits_file", "module_file", "artifact", "saved", "recipe"):
        if isinstance(getattr(options, name, None), str):
            read[_place(getattr(options, name))] = name.replace("_", " ")
    for name in ("out", "scores", "plot", "report"):
        value = getattr(options, name, None)
        if not isinstance(value, str):
            continue
        if options.verb in ("train", "demo") and name == "out":
            check_place(Path(value) / "*")
            continue
        check_place(Path(value))
        path = _place(value)
        if path in read or path in written:
            other = read[path] if path in read else f"--{written[path]}"
            raise WriteError(f"--{name} {value} is the file of {other} too. Give it another name.")
        written[path] = name
        if path.is_file() and not getattr(options, "dry_run", False):
            print(f"note: {value} is there already and is replaced", file=sys.stderr)


def _place(name: str) -> Path:
    """Where a name leads, all links followed as far as they go."""
    try:
        return Path(os.path.realpath(name))
    except ValueError:  # a NUL character, which reading or writing tells
        return Path(name)


def _example_of(options: Namespace) -> Any:
    from mpq_plugins.cli.sources import example_input, parse_shape

    if options.input:
        return example_input(parse_shape(options.input))
    if options.data:
        return next(iter(take(data_of(options), 1))).inputs
    if options.model.startswith(("torchvision:", "timm:")):
        return example_input((1, 3, 224, 224))
    raise ModelError("the input shape is not known. Add --input, such as 1x3x32x32, or --data.")


def data_of(options: Namespace) -> Iterable[Any]:
    """The batches that `--data` names."""
    from mpq_plugins.cli.sources import load_data, parse_shape

    if options.data is None:
        raise DataError("this needs data. Add --data: digits, imagefolder:DIR, file.py:LOADER or module:LOADER.")
    shape = parse_shape(options.input) if options.input else None
    return load_data(options.data, input_shape=shape, batch_size=options.batch_size)


def take(loader: Iterable[Any], n_images: int) -> Iterable[Batch]:
    """Batches from the start of `loader` until they hold at least `n_images`."""
    from mpq_plugins.model.run import batches_of, first_batch

    first_batch(loader, purpose="this verb")
    taken = 0
    for batch in batches_of(loader):
        if taken >= n_images:
            return
        yield batch
        taken += len(batch)


def adapter_of(options: Namespace) -> AbstractAdapter:
    """The adapter that `--adapter` names, with its options."""
    adapter: AbstractAdapter = make("adapters", options.adapter, values_of(options.adapter_option))
    return adapter


def space_options(options: Namespace, model: nn.Module, example: Any) -> dict[str, Any]:
    """The arguments of `build_space` that the options stand for."""
    from mpq_plugins.model.discover import find_layers
    from mpq_plugins.space.space import residual_ties

    adapter = adapter_of(options) if options.adapter else None
    ties: list[Sequence[str]] = [words_of(group) for group in options.tie]
    if options.tie_residual:
        ties += residual_ties(find_layers(model, example))
    choices = None
    if options.bits or options.activation_bits:
        weight = ",".join(options.bits) or (adapter.weight_bits if adapter else range(2, 9))
        activation = ",".join(options.activation_bits) or (adapter.activation_bits if adapter else (8,))
        choices = menu(weight, activation)
    return {
        "choices": choices,
        "adapter": adapter,
        "pin": options.pin,
        "pin_first_last": options.pin_first_last,
        "tie": ties,
        "include": options.include or ("*",),
        "exclude": options.exclude,
        "strict": options.strict,
    }
