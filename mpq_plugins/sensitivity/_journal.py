"""Measurements on disk as they are made, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from mpq_plugins._files import write_json, write_whole
from mpq_plugins._model import Batch, tensors

FORMAT = "mpq-journal/1"
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
class Journal:
    """Named arrays of one piece of work, each in a file that is whole or absent.

    `identity` says what was measured, on what and how; work of another identity has another folder.
    """

    def __init__(self, identity: Mapping[str, Any]) -> None:
        root = _folder.get()
        self._folder: Path | None = None
        self._memory: dict[str, dict[str, np.ndarray]] = {}
        if root is not None:
            text = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
            self._folder = root / hashlib.sha256(text.encode()).hexdigest()[:20]
            if not (self._folder / "identity.json").exists():
                write_json(self._folder / "identity.json", json.loads(text))

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays under `key`, or None when they were not measured yet (or their file does not read)."""
        if self._folder is None:
            return self._memory.get(key)
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return dict(load_file(self._file(key)))
        except (OSError, SafetensorError):
            return None

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep arrays under `key`. Raises `WriteError`."""
        if self._folder is None:
            self._memory[key] = dict(arrays)
            return
        from safetensors.numpy import save_file

        whole = {name: np.array(array, order="C") for name, array in arrays.items()}
        write_whole(self._file(key), lambda path: save_file(whole, path))

    def drop(self, keys: Iterable[str]) -> None:
        """Forget arrays that others now stand for."""
        for key in keys:
            if self._folder is None:
                self._memory.pop(key, None)
            else:
                self._file(key).unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{key}.safetensors"


def digest_of_model(model: nn.Module) -> str:
    """Digest of all parameters and buffers."""
    state = [(name, value) for name, value in model.state_dict().items() if isinstance(value, Tensor)]
    return _digest((name.encode(), value) for name, value in state)


def digest_of_batches(batches: Iterable[Batch]) -> str:
    """Digest of all inputs and labels."""
    found = [
        (str(index).encode(), tensor) for index, batch in enumerate(batches) for tensor in tensors((batch.inputs, batch.labels))
    ]
    return _digest(found)


def _digest(items: Iterable[tuple[bytes, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in items:
        digest.update(name + str((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
