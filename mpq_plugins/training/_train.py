"""Quantization-aware training of a bit configuration, through any adapter."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpq_plugins._adapter import AbstractAdapter, bits_of, is_prepared
from mpq_plugins._bits import BitConfig
from mpq_plugins._discover import find_layers
from mpq_plugins._errors import DataError, TrainingError
from mpq_plugins._evaluate import accuracy
from mpq_plugins._model import Batch, Output, batches_of, call, device_of
from mpq_plugins._plugins import require
from mpq_plugins._progress import track
from mpq_plugins.training._average import Averaged
from mpq_plugins.training._batch_norm import reestimate_batch_norm
from mpq_plugins.training._checkpoints import TrainingFolder, history_from_json, history_to_json
from mpq_plugins.training._epochs import Epoch, TrainingData
from mpq_plugins.training._loss import Classification, Loss
from mpq_plugins.training._metrics import EpochRecord, MetricFiles
from mpq_plugins.training._parameter_groups import parameter_groups
from mpq_plugins.training._profit import Profit
from mpq_plugins.training._recipe import TrainingRecipe, rate_factor

_CALIBRATION_BATCHES = 8


@final
@dataclass(frozen=True)
class Trained:
    """A trained quantized module in evaluation mode, a record of every epoch, and AIWQ per layer where PROFIT measured it."""

    module: nn.Module
    history: tuple[EpochRecord, ...]
    instability: Mapping[str, float] = field(default_factory=dict)


def train(
    model: nn.Module,
    bits: BitConfig,
    data: TrainingData,
    *,
    adapter: AbstractAdapter,
    recipe: TrainingRecipe | None = None,
    example: Any = None,
    calibration: Iterable[Any] = (),
    evaluation: Iterable[Any] | None = None,
    teacher: nn.Module | None = None,
    loss: Loss | None = None,
    output: Output = None,
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    tensorboard: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> Trained:
    """Prepare the float `model` at `bits` through `adapter` and train it; the model itself stays as it is.

    `data` are labelled batches, read afresh in every epoch, or a function from an epoch's number (from 0) to its batches.
    `calibration` are batches for ranges and statistics (default: the first 8 of the data), `evaluation` labelled batches
    whose accuracy is reported after every epoch and selects nothing. `teacher` is a float network for distillation. `loss`
    takes the module's result and the batch, in place of the recipe's cross-entropy. `options` are those of
    `adapter.prepare`. Devices, mixed precision and processes are those of Hugging Face accelerate (`accelerate launch`).

    With a `folder` each epoch leaves a checkpoint there, and the same call goes on where it was stopped, to the same weights
    on a CPU as if it never had been. Random numbers are seeded from the recipe and the epoch.
    Raises `TrainingError` when the loss is not finite, `DataError`, `ModelError`, `AdapterError`, `MissingExtraError`.
    """
    recipe = recipe or TrainingRecipe()
    calibration = list(batches_of(calibration)) or _first_batches(data)
    example = calibration[0].inputs if example is None else example
    bits.check(find_layers(model, example))
    job = _Job(model, bits, data, adapter, recipe, example, calibration, evaluation, output, dict(options or {}))
    run = _Run(job, teacher, loss, None if folder is None else TrainingFolder(folder), tensorboard=tensorboard)
    return run.to_the_end(on_epoch or (lambda _: None))


@final
@dataclass(frozen=True)
class _Job:
    """What was asked for."""

    model: nn.Module
    bits: BitConfig
    data: TrainingData
    adapter: AbstractAdapter
    recipe: TrainingRecipe
    example: Any
    calibration: Sequence[Batch]
    evaluation: Iterable[Any] | None
    output: Output
    options: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """What a resumed run must have in common with the first."""
        layers = {name: str(precision) for name, precision in self.bits.layers.items()}
        own: list[str] = [item.name for item in fields(self.adapter)] if is_dataclass(self.adapter) else []
        adapter = {name: getattr(self.adapter, name) for name in own}
        return {
            "adapter": {"name": self.adapter.name, **adapter},
            "bits": {"fingerprint": self.bits.fingerprint, "layers": layers},
            "options": dict(self.options),
            "recipe": self.recipe.to_json(),
        }


class _Run:
    """Training as it goes on: the module, its optimizer, and where they stand."""

    def __init__(
        self, job: _Job, teacher: nn.Module | None, loss: Loss | None, folder: TrainingFolder | None, *, tensorboard: bool
    ) -> None:
        self.job, self.recipe, self.folder = job, job.recipe, folder
        self.accelerator = _accelerator(job.recipe)
        self.profit = Profit(job.recipe.stages(job.bits))
        self.module: nn.Module | None = None
        self.average: Averaged | None = None
        self._with_float_weights = False
        self.history: list[EpochRecord] = []
        if teacher is not None:
            teacher = teacher.to(self.accelerator.device).eval()
        self.loss = loss or Classification(
            job.output, self.recipe.label_smoothing, teacher, self.recipe.teacher_weight, self.recipe.temperature
        )
        self.metrics: MetricFiles | None = None
        if folder is not None and self.accelerator.is_main_process:
            folder.claim(job.to_json())
            self.metrics = MetricFiles(folder.path, tensorboard=tensorboard)

    def to_the_end(self, on_epoch: Callable[[EpochRecord], None]) -> Trained:
        """Every epoch that is still to do."""
        n_done = self._resume()
        if self.metrics is not None:
            self.metrics.restart(self.history)
        plan = [(index, epoch) for index, stage in enumerate(self.profit.stages) for epoch in range(stage.epochs)]
        for index, epoch in track(plan[n_done:], "training"):
            if epoch == 0:
                self._change_bits(index)
                self._enter(index)
            record = self._epoch(epoch)
            self.history.append(record)
            self._keep(index, epoch)
            if self.accelerator.is_main_process:
                on_epoch(record)
        return self._finish()

    # Stages ---------------------------------------------------------------------------------------------------------------

    def _change_bits(self, index: int) -> None:
        """Bring the module to the bits of a stage that begins."""
        stage, job = self.profit.stages[index], self.job
        self._seed(f"stage {index}")
        if stage.bits is None:
            self.module = copy.deepcopy(job.model)
        elif self.module is None or not is_prepared(self.module):
            source = self.module or job.model
            self.module = job.adapter.prepare(source, stage.bits, job.example, job.calibration, **job.options)
        elif bits_of(self.module).layers != stage.bits.layers:
            job.adapter.set_bits(self.module, stage.bits, job.calibration)

    def _enter(self, index: int) -> None:
        """Optimizer, average and freezing of a stage, for a module that has its bits."""
        assert self.module is not None  # the caller made it
        stage, recipe = self.profit.stages[index], self.recipe
        self.module.to(self.accelerator.device)
        if stage.float_weights or self._with_float_weights:
            self.job.adapter.use_float_weights(self.module, stage.float_weights)
            self._with_float_weights = stage.float_weights
        self.profit.on_stage(index, self.module)
        for parameter in self.module.parameters():
            parameter.grad = None
        groups = parameter_groups(
            self.module,
            learning_rate=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            range_factor=recipe.range_factor,
        )
        self._peaks = [group["lr"] for group in groups]
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.SGD(groups, recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
        )
        self.average = None if recipe.ema_decay is None else Averaged(self.module, recipe.ema_decay)
        self._parallel = _in_parallel(self.module, self.accelerator)

    # Epochs and steps -----------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> EpochRecord:
        assert self.module is not None  # entering the stage made it
        stage, number = self.profit.stage, len(self.history)
        self._seed(f"epoch {number}")
        batches = Epoch(self.job.data, number, accelerator=self.accelerator)
        self.profit.on_epoch()
        self.module.train()
        total, n_images, start = 0.0, 0, time.perf_counter()
        for step, batch in enumerate(track(batches, f"epoch {number + 1}: {stage.name}", len(batches))):
            rate = self._set_rates(rate_factor(epoch * len(batches) + step, stage.epochs * len(batches), self.recipe.warm_up))
            total += self._step(batch, f"step {step + 1} of {len(batches)} in epoch {number + 1} ({stage.name})")
            n_images += len(batch)
        seconds = time.perf_counter() - start
        if stage.samples and self.profit.meter is not None:
            self.profit.meter.average(lambda tensor: self.accelerator.reduce(tensor, reduction="mean"))
        if self.average is not None and epoch + 1 == stage.epochs:
            self.average.settle()
            self.average = None
        return EpochRecord(
            epoch=number + 1,
            stage=stage.name,
            steps=(self.history[-1].steps if self.history else 0) + len(batches),
            loss=total / len(batches),
            learning_rate=rate,
            seconds=seconds,
            n_images=n_images * self.accelerator.num_processes,
            n_frozen=len(self.profit.frozen),
            accuracy=self._accuracy(),
            instability=self.profit.instability if stage.samples else {},
        )

    def _step(self, batch: Batch, where: str) -> float:
        """One step of the optimizer; the loss before it, over all processes."""
        assert self.module is not None  # entering the stage made it
        self.optimizer.zero_grad()
        with self.profit.forward(), self.accelerator.autocast():
            loss = self.loss(call(self._parallel, batch.inputs), batch)
        value = float(self.accelerator.reduce(loss.detach(), reduction="mean"))
        if not math.isfinite(value):
            raise TrainingError(self._abort_text(value, where))
        self.accelerator.backward(loss)
        self.profit.on_step()
        if self.recipe.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return value

    def _abort_text(self, value: float, where: str) -> str:
        latest = None if self.folder is None else self.folder.latest
        kept = "No checkpoint was kept, because no folder was given" if self.folder is None else "No epoch was finished before"
        if latest is not None:
            kept = f"The last good checkpoint is {latest}"
        return (
            f"the loss is {value} at {where}. {kept}. Lower the learning rate ({self.recipe.learning_rate:g}), bound the "
            "gradients (clip_norm), or check the batch for values that are not finite."
        )

    def _set_rates(self, factor: float) -> float:
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        return self.recipe.learning_rate * factor

    def _accuracy(self) -> float | None:
        if self.job.evaluation is None or not self.accelerator.is_main_process:
            return None
        assert self.module is not None  # entering the stage made it
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            return accuracy(self.module, self.job.evaluation, output=self.job.output)

    def _seed(self, what: str) -> None:
        # A resumed run must draw what an uninterrupted one draws, wherever it goes on.
        require("accelerate.utils", "train").set_seed(zlib.crc32(f"{self.recipe.seed} {what}".encode()))

    # Checkpoints ----------------------------------------------------------------------------------------------------------

    def _keep(self, index: int, epoch: int) -> None:
        if self.folder is not None and self.metrics is not None:
            scaler = self.accelerator.scaler
            state = {
                "stage": index,
                "epoch": epoch,
                "optimizer": self.optimizer.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "profit": json.dumps(self.profit.state_dict()),
                "history": history_to_json(self.history),
            }
            self.folder.save(len(self.history), self._save_module, state)
            self.metrics.add(self.history[-1])
        self.accelerator.wait_for_everyone()

    def _save_module(self, path: Path) -> None:
        assert self.module is not None  # an epoch is done
        if is_prepared(self.module):
            self.job.adapter.save(self.module, path)
        else:
            torch.save(self.module.state_dict(), path)

    def _resume(self) -> int:
        """Take up the last checkpoint of the folder; returns the number of epochs that are done."""
        latest = None if self.folder is None else self.folder.latest
        if latest is None:
            return 0
        module_path, state = TrainingFolder.read(latest)
        self.history = history_from_json(state["history"])
        self.profit.load_state_dict(json.loads(state["profit"]))
        stage = self.profit.stages[state["stage"]]
        if stage.bits is None:
            self.module = copy.deepcopy(self.job.model)
            self.module.load_state_dict(torch.load(module_path, weights_only=True, map_location="cpu"))
        else:
            self.module = self.job.adapter.load(self.job.model, module_path, self.job.example)
        self._with_float_weights = False  # a module that was loaded quantizes its weights
        self._enter(state["stage"])
        if state["epoch"] + 1 < stage.epochs:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return len(self.history)

    def _finish(self) -> Trained:
        assert self.module is not None  # there is at least one epoch
        module = self.module.to(device_of(self.job.model)).eval()
        for parameter in module.parameters():
            parameter.grad = None
        if self.recipe.bn_reestimation:
            reestimate_batch_norm(module, self.job.calibration)
        if self.metrics is not None:
            assert self.folder is not None  # metrics are written into it
            self.job.adapter.save(module, self.folder.path / "module.pt")
            self.metrics.close()
        return Trained(module, tuple(self.history), self.profit.instability)


def _accelerator(recipe: TrainingRecipe) -> Any:
    accelerate = require("accelerate", "train")
    # Its settings are one object for the whole process, which would refuse another precision than an earlier run's.
    require("accelerate.state", "train").AcceleratorState._reset_state()
    return accelerate.Accelerator(mixed_precision=recipe.mixed_precision)


def _in_parallel(module: nn.Module, accelerator: Any) -> nn.Module:
    """The module as several processes train it together; accelerate's own wrapper would replace its forward method."""
    if accelerator.num_processes < 2:
        return module
    device = accelerator.device
    ids = None if device.type == "cpu" else [device.index]
    # Ranges of weights that are left in float get no gradient.
    return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)


def _first_batches(data: TrainingData) -> list[Batch]:
    """A few batches, the same ones each time, whatever order a loader draws."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = list(islice(batches_of(data(0) if callable(data) else data), _CALIBRATION_BATCHES))
    if not found:
        raise DataError("the training data are empty. Give batches of inputs and labels.")
    return found
