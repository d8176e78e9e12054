"""A tiny network, data and recipes for tests of the training loop; a script too, for processes that are killed or several."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.adapter.base import AbstractAdapter
from mpq_plugins.digits import digits
from mpq_plugins.training import EpochRecord, ProfitSchedule, Trained, TrainingRecipe, train

QAT = TrainingRecipe("qat", epochs=3, ema_decay=0.9, clip_norm=1.0, learning_rate=0.05)
# Activations, weights, measuring, all layers, freezing: every kind of stage but the settling ones, in seven epochs.
PROFIT = replace(QAT, method="profit", epochs=7, profit=ProfitSchedule(widths=(6,), sample_epochs=15, settle_epochs=0))


class Net(nn.Module):
    """A strided and a depthwise convolution and a classifier, with batch normalisation and dropout."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, dropout: float = 0.1) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, 2, 1, bias=False), norm(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8), norm(8)
        self.relu, self.relu2 = nn.ReLU(), nn.ReLU()
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(images)))
        x = self.relu2(self.bn2(self.depthwise(x)))
        return self.fc(self.dropout(x.mean((2, 3))))


def net(**options: Any) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(**options)


def data(n_batches: int = 3, batch_size: int = 16) -> Sequence[Any]:
    return digits(train=True, batch_size=batch_size)[:n_batches]


def adapter(name: str) -> AbstractAdapter:
    if name == "nncf":
        from mpq_nncf import NNCFAdapter

        return NNCFAdapter()
    from mpq_brevitas import BrevitasAdapter

    return BrevitasAdapter()


def bits_for(model: nn.Module, example: Any = None) -> BitConfig:
    inventory = find_layers(model, data()[0].inputs if example is None else example)
    widths = {"stem": Precision(8, 8), "depthwise": Precision(4, 4), "fc": Precision(3, 4)}
    return BitConfig(widths, inventory.fingerprint)


def run(name: str, recipe: TrainingRecipe, **options: Any) -> Trained:
    """`train` on the tiny network, unless `options` say otherwise."""
    model = options.pop("model", None) or net()
    options = {"data": data(), "options": {"weight_range": "max"}, "calibration": data(), **options}
    bits = bits_for(model, options.get("example"))
    return train(model, bits, options.pop("data"), adapter=adapter(name), recipe=recipe, **options)


def without_time(history: Sequence[EpochRecord]) -> list[EpochRecord]:
    return [replace(record, seconds=0.0) for record in history]


class Stopping:
    """Data that raise, or do what they are told, before one step of all; steps count from 0."""

    def __init__(self, batches: Sequence[Any], at: int, do: Callable[[], object]) -> None:
        self.batches, self.at, self.do = batches, at, do

    def __call__(self, number: int) -> Sequence[Any]:
        return _Watched(self, number)


class _Watched(Sequence):  # a sequence, so that it is read in the order that a list would be
    def __init__(self, stopping: Stopping, number: int) -> None:
        self._stopping, self._number, self._n_read = stopping, number, 0

    def __len__(self) -> int:
        return len(self._stopping.batches)

    def __getitem__(self, index: int) -> Any:
        if self._number * len(self) + self._n_read == self._stopping.at:
            self._stopping.do()
        self._n_read += 1
        return self._stopping.batches[index]


def tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class InOrder:
    """Batches that are read in their order, which a list's are not."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def frozen_norms() -> Net:
    """The tiny network in training mode, but for its batch normalisation."""
    model = net(dropout=0.0)
    model.bn.eval()
    model.bn2.eval()
    return model


def together(name: str, batch_size: int, folder: Path | None = None) -> dict[str, Any]:
    """What runs give whose curves must not depend on how many processes share the work."""
    batches = InOrder(data(48 // batch_size, batch_size))
    made = {
        "frozen norms": run(name, QAT, model=frozen_norms(), data=batches, folder=folder and folder / "qat"),
        "profit": run(name, PROFIT, model=frozen_norms(), data=batches, folder=folder and folder / "profit"),
        "norms": run(name, QAT, model=net(dropout=0.0), data=batches),
    }
    return {
        case: {
            "losses": [record.loss for record in trained.history],
            "instability": dict(trained.instability),
            "state": {key: tensor.double().sum().item() for key, tensor in trained.module.state_dict().items()},
        }
        for case, trained in made.items()
    }


def _killed(name: str, folder: Path, at: int) -> None:
    run(name, PROFIT, data=Stopping(data(), at, kill_me), folder=folder, evaluation=data())


def _one_of_several(folder: Path) -> None:
    made = {name: together(name, 8, folder / name) for name in ("brevitas", "nncf")}
    (folder / f"process-{os.environ['RANK']}.json").write_text(json.dumps(made))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 2:
        _one_of_several(Path(sys.argv[1]))
    else:
        _killed(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
