"""What training reports: one record per epoch, lines of JSON, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

from mpq_plugins.common.files import write_whole
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import WriteError


@final
@dataclass(frozen=True)
class EpochRecord:
    """What an epoch did, from 1: mean training loss over its steps, last learning rate, accuracy where it was evaluated.

    `seconds` are of the training steps alone, `n_images` of all processes together. `n_frozen` counts the layers that PROFIT
    held still, `instability` is AIWQ per layer as measured so far, where this epoch measured it.
    """

    epoch: int
    stage: str
    steps: int
    loss: float
    learning_rate: float
    seconds: float
    n_images: int
    n_frozen: int = 0
    accuracy: float | None = None
    instability: Mapping[str, float] = field(default_factory=dict)


@final
class MetricFiles:
    """`metrics.jsonl` in a folder, and its `tensorboard` sub-folder when asked for.

    A resumed run rewrites the lines from the records of its checkpoint, so that nothing stands there twice.
    """

    def __init__(self, folder: Path, *, tensorboard: bool) -> None:
        self._path, self._folder = folder / "metrics.jsonl", folder / "tensorboard"
        self._board = require("torch.utils.tensorboard", "train") if tensorboard else None
        self._writer: Any = None

    def restart(self, records: Sequence[EpochRecord]) -> None:
        """Begin after these records."""
        text = "".join(_line(record) for record in records)
        write_whole(self._path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        if self._board is not None:
            self._writer = self._board.SummaryWriter(str(self._folder), purge_step=records[-1].steps + 1 if records else 0)

    def add(self, record: EpochRecord) -> None:
        """Write one more record, at once."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(record))
        except OSError as error:
            raise WriteError(
                f"cannot write {self._path}: {error.strerror or error}. Make room, and give the same command to go on."
            ) from error
        if self._writer is None:
            return
        values = {"loss": record.loss, "learning rate": record.learning_rate, "accuracy": record.accuracy}
        values |= {f"AIWQ/{name}": value for name, value in record.instability.items()}
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.steps)
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()


def _line(record: EpochRecord) -> str:
    return json.dumps(asdict(record), sort_keys=True) + "\n"
