"""Measurements on disk as they are made, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from importlib.metadata import version
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from mpq_plugins.common.files import reason_of, write_json
from mpq_plugins.common.tensor_files import read_tensors, write_tensors
from mpq_plugins.errors import FormatError, WriteError
from mpq_plugins.model.run import Batch, tensors

FORMAT = "mpq-journal/3"
_CHECKSUM = "sha256"
_folder: ContextVar[Path | None] = ContextVar("journal folder", default=None)


@contextlib.contextmanager
def keeping_measurements(folder: str | Path | None) -> Iterator[None]:
    """Let scores keep what they measure under `folder` for the time being, and take up what lies there; None for not."""
    token = _folder.set(None if folder is None else Path(folder))
    try:
        yield
    finally:
        _folder.reset(token)


@final
class MeasurementCache:
    """Named arrays of one piece of work, each in a file that is whole or absent.

    `identity` says what was measured, on what and how; work of another identity has another folder. Raises `WriteError`.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        root = _folder.get()
        self._folder: Path | None = None
        self._memory: dict[str, dict[str, np.ndarray]] = {}
        if root is not None:
            text = json.dumps({"format": FORMAT, "version": version("mpq-plugins"), **identity}, sort_keys=True)
            self._folder = root / hashlib.sha256(text.encode()).hexdigest()[:20]
            if not (self._folder / "identity.json").exists():
                with _telling_where(root):
                    write_json(self._folder / "identity.json", json.loads(text))

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays under `key`, or None when they were not measured yet (or their file is not as it was written)."""
        if self._folder is None:
            return self._memory.get(key)
        try:
            arrays, kept = read_tensors(self._file(key))
        except FormatError:
            return None
        return arrays if kept.get(_CHECKSUM) == self._checksum(key, arrays) else None

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under `key`. Raises `WriteError`."""
        if self._folder is None:
            self._memory[key] = dict(arrays)
            return
        with _telling_where(self._folder.parent):
            write_tensors(self._file(key), arrays, {_CHECKSUM: self._checksum(key, arrays)})

    def kept(self, key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The arrays under `key`, made and kept where there are none. Raises `WriteError`."""
        arrays = self.get(key)
        if arrays is None:
            arrays = make()
            self.put(key, arrays)
        return arrays

    def drop(self, keys: Iterable[str]) -> None:
        """Forget arrays that others now stand for."""
        for key in keys:
            if self._folder is None:
                self._memory.pop(key, None)
            else:
                with contextlib.suppress(OSError):  # a file too many does no harm
                    self._file(key).unlink()

    def _checksum(self, key: str, arrays: Mapping[str, np.ndarray]) -> str:
        """A digest of arrays and of what they were measured for: a file of another run does not pass for this one's."""
        assert self._folder is not None
        digest = hashlib.sha256(f"{self._folder.name} {key}".encode())
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.safetensors"


def digest_of_model(model: nn.Module) -> str:
    """Digest of the modules and how their classes are written, and of all parameters and buffers."""
    kinds = {type(module) for module in model.modules()}
    # torch's own classes are told by what they print; a user's may have been edited since.
    written = sorted(text_of_source(kind) for kind in kinds if not kind.__module__.startswith("torch."))
    state = {**dict(model.named_buffers()), **model.state_dict()}  # the former has the buffers that are not saved
    held = [(name.encode(), value) for name, value in state.items() if isinstance(value, Tensor)]
    return _digest(held, "\n".join([_without_addresses(repr(model)), *written]))


def digest_of_batches(batches: Iterable[Batch]) -> str:
    """Digest of all inputs and labels."""
    parts = [
        (f"{index} {part}".encode(), value)
        for index, batch in enumerate(batches)
        for part, value in (("inputs", batch.inputs), ("labels", batch.labels))
    ]
    return _digest((name, tensor) for name, value in parts for tensor in tensors(value))


def text_of_function(function: Callable[..., Any]) -> str:
    """How a function is written and what is bound to it. Functions that it calls are not followed."""
    if isinstance(function, functools.partial):
        bound: Any = (function.args, sorted(function.keywords.items()))
        return f"{text_of_function(function.func)}\n{_without_addresses(repr(bound))}"
    if not inspect.isroutine(function):
        return f"{text_of_source(type(function))}\n{_without_addresses(repr(function))}"
    cells = [_content(cell) for cell in getattr(function, "__closure__", None) or ()]
    bound = (cells, *(getattr(function, name, None) for name in ("__self__", "__defaults__", "__kwdefaults__")))
    return f"{text_of_source(function)}\n{_without_addresses(repr(bound))}"


def _content(cell: Any) -> Any:
    try:
        found = cell.cell_contents
        return vars(found) if hasattr(found, "__dataclass_fields__") and hasattr(found, "__dict__") else found
    except ValueError:  # Not filled yet.
        return None


def text_of_source(written: Any) -> str:
    """The source of a class or function; its name where there is none to read."""
    try:
        return inspect.getsource(written)
    except (OSError, TypeError):
        return f"{written.__module__}.{written.__qualname__}"


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


@contextlib.contextmanager
def _telling_where(folder: Path) -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        raise WriteError(
            f"measurements cannot be kept under {folder}: {reason_of(error)}. Choose a folder that you may write to, with "
            "space left (--cache on the command line), or keep none (--no-cache)."
        ) from error


def _digest(items: Iterable[tuple[bytes, Tensor]], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in items:
        digest.update(name + str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
