"""The folder of a training run: what was asked for, a checkpoint after every epoch, metrics."""

from __future__ import annotations

import contextlib
import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, final

from mpq_plugins.common.files import check_keys, disk_refusal, read_json, reason_of, write_json
from mpq_plugins.common.locks import lock_file
from mpq_plugins.common.partial import partial_folder
from mpq_plugins.common.tensor_files import read_torch, write_torch
from mpq_plugins.errors import FormatError, MPQError, TrainingError, WriteError
from mpq_plugins.space.bits import BitConfig

JOB, FORMAT = "mpq-training/1", "mpq-training-state/1"
_KEPT = 2
_MODULE, _STATE = "module.pt", "training.pt"
_KEYS = ("stage", "epoch", "optimizer", "average", "scaler", "profit", "history")


@final
class TrainingFolder:
    """Checkpoints `epoch-NNNN` of one training run; each is a folder that is either whole or absent, the last two are kept."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._held = contextlib.ExitStack()

    def __enter__(self) -> TrainingFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let other processes train here."""
        self._held.close()

    def claim(self, job: Mapping[str, Any]) -> None:
        """Say what is trained here, and keep other processes out until the folder is left as a context.

        Raises `TrainingError` when something else was begun here, or another process trains here.
        """
        path = self.path / "job.json"
        document = json.loads(json.dumps({**job, "format": JOB}, default=repr))
        self._keep_others_out()
        try:
            if path.exists():
                self._check(path, document)
            else:
                write_json(path, document)
        except BaseException:
            self.__exit__()
            raise

    def _keep_others_out(self) -> None:
        own = (os.getpid(), self.path.resolve())
        if own in _CLAIMED:
            raise TrainingError(f"this process is training in {self.path} already. Wait for its end, or give another folder.")
        with contextlib.suppress(OSError):  # told when something is written
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            lock = lock_file(self.path / ".lock")
        except BlockingIOError as error:
            raise TrainingError(
                f"another process is training in {self.path}. Wait for its end, or give another folder."
            ) from error
        if lock is not None:
            self._held.callback(lock.close)
        _CLAIMED[own] = self
        self._held.callback(_CLAIMED.pop, own, None)

    def _check(self, path: Path, document: Mapping[str, Any]) -> None:
        begun = read_json(path, format=JOB)
        bits = BitConfig.from_json(begun.get("bits"), where=f"{path}: its bits").to_json()
        begun["bits"] = {key: bits[key] for key in document["bits"]}  # older releases wrote texts such as w4a8
        different = _differences(begun, document)
        if different:
            raise TrainingError(
                f"{self.path} holds a training run with other settings ({'; '.join(different[:4])}). Resume it with the "
                "settings it was begun with, or give another folder."
            )

    @property
    def latest(self) -> Path | None:
        """The checkpoint of the last epoch that was finished."""
        found = self._checkpoints()
        return found[-1] if found else None

    def _checkpoints(self) -> list[Path]:
        numbered = [path for path in self.path.glob("epoch-*") if path.name.removeprefix("epoch-").isdigit()]
        return sorted(numbered, key=lambda path: int(path.name.removeprefix("epoch-")))

    def save(self, number: int, save_module: Callable[[Path], object], state: Mapping[str, Any]) -> Path:
        """Keep the module and the state after epoch `number`; older checkpoints than the last two go."""
        target = self.path / f"epoch-{number:04d}"
        try:
            with partial_folder(self.path) as partial:
                written = partial / target.name
                written.mkdir()
                save_module(written / _MODULE)
                write_torch(written / _STATE, {"format": FORMAT, **{key: state[key] for key in _KEYS}})
                if target.exists():
                    target.rename(partial / "replaced")
                written.rename(target)
                for old in self._checkpoints()[:-_KEPT]:
                    old.rename(partial / old.name)  # moved away whole, since deleting takes a while
        except Exception as error:
            reason = reason_of(error) if isinstance(error, WriteError) else disk_refusal(error)
            if reason is None:
                raise
            raise WriteError(
                f"cannot write the checkpoint {target}: {reason}. Free some space, or choose another folder; "
                "the checkpoints before it are whole."
            ) from error
        return target

    @staticmethod
    def read(checkpoint: Path) -> tuple[Path, dict[str, Any]]:
        """The module's file and the state of a checkpoint; raises `FormatError`."""
        path = checkpoint / _STATE
        with telling_damage(checkpoint):
            document = read_torch(path)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise FormatError(f"{path} is of another version. Train with the version that began, or in a new folder.")
        check_keys(document, allowed={*_KEYS, "format"}, required=set(_KEYS), where=str(path))
        return checkpoint / _MODULE, document


@contextlib.contextmanager
def telling_damage(checkpoint: Path) -> Iterator[None]:
    """Tell what is raised while a checkpoint is read as a `FormatError` that says how to go on."""
    try:
        yield
    except Exception as error:  # torch raises errors of many kinds for damaged archives
        what = str(error) if isinstance(error, MPQError) else type(error).__name__
        raise FormatError(
            f"the checkpoint {checkpoint} cannot be read ({what}). Delete it to go on from the one before it."
        ) from error


# By process, since locks do not hold against the process that has them; a folder that nobody holds any more is free.
_CLAIMED: weakref.WeakValueDictionary[tuple[int, Path], TrainingFolder] = weakref.WeakValueDictionary()


def _differences(begun: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted({*begun, *asked}):
        old, new = begun.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old!r} then, {new!r} now")
    return found
