"""Quantization-aware training of a bit configuration, through any adapter."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_plugins.adapter.base import AbstractAdapter, bits_of, is_prepared
from mpq_plugins.adapter.evaluate import accuracy
from mpq_plugins.adapter.record import Origin, record
from mpq_plugins.common.plugins import resolve
from mpq_plugins.common.progress import track
from mpq_plugins.common.tensor_files import read_torch, write_torch
from mpq_plugins.errors import DataError, TrainingError
from mpq_plugins.model.discover import find_layers
from mpq_plugins.model.run import Batch, Output, batches_of, call, device_of, to_device
from mpq_plugins.quantizers.batch_norm import (
    copy_statistics,
    corrected_around,
    has_statistics,
    norm_sites,
    reestimate_batch_norm,
)
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.training.average import Averaged
from mpq_plugins.training.checkpoints import TrainingFolder, telling_damage
from mpq_plugins.training.engine import agree, engine, in_parallel, seed_all
from mpq_plugins.training.epochs import Epoch, TrainingData, seed_loader
from mpq_plugins.training.job import Job
from mpq_plugins.training.loss import Classification, Loss
from mpq_plugins.training.metrics import EpochRecord, MetricFiles
from mpq_plugins.training.parameter_groups import parameter_groups
from mpq_plugins.training.profit import Profit
from mpq_plugins.training.recipe import TrainingRecipe, rate_factor
from mpq_plugins.training.refusals import abort_text, check_evaluation, check_finite, check_loss, telling_lone_images

_LOG = logging.getLogger("mpq_plugins.training")
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
    adapter: AbstractAdapter | type[AbstractAdapter] | str,
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
    command: Mapping[str, Any] | None = None,
) -> Trained:
    """Prepare the float `model` at `bits` through `adapter` and train it; the model itself stays as it is.

    Parameters with `requires_grad` off stay as they are, and so do, in a model in training mode, the statistics of parts in
    evaluation mode. Random numbers follow from the recipe and the epoch; the caller's come back afterwards. Devices, mixed
    precision and processes are those of Hugging Face accelerate (`accelerate launch`).

    Args:
        model: a float torch model.
        bits: the precisions to train at.
        data: batches, read afresh in every epoch, or a function epoch (from 0) -> batches; labels are needed unless `teacher`.
        adapter: a name, class or object.
        recipe: method, epochs, learning rate and the like.
        example: one input as the model takes it; by default the first batch.
        calibration: batches for ranges and statistics; by default the first 8 of the data.
        evaluation: labelled batches; their accuracy is reported after every epoch and selects nothing.
        teacher: a float network for distillation.
        loss: (module's result, batch) -> loss, in place of cross-entropy.
        output: the output that counts: a key, an index or a function.
        options: those of `adapter.prepare`.
        folder: each epoch leaves a checkpoint there, and the same call resumes; on a CPU the weights end up the same.
        tensorboard: write TensorBoard's files to `folder` too.
        on_epoch: called with the record of every epoch.
        command: options of the command line, for checkpoints to keep.

    Raises `TrainingError` when the loss is not finite, `DataError`, `ModelError`, `AdapterError`, `MissingExtraError`.

    Example:
        >>> model, batches = torch.nn.Sequential(torch.nn.Linear(16, 4)), [(torch.randn(32, 16), torch.arange(32) % 4)]
        >>> bits = mpq.allocate(model, torch.zeros(1, 16), budgets="size=w4", proxy="weight-error").bits
        >>> len(train(model, bits, batches, adapter="brevitas", recipe=TrainingRecipe(epochs=2)).history)
        2
    """
    recipe, target = recipe or TrainingRecipe(), resolve("adapters", adapter)
    if tensorboard and folder is None:
        raise TrainingError("TensorBoard's files need a folder to lie in, and none was given. Give folder= (--out).")
    kept = None if folder is None else TrainingFolder(folder)
    with engine(recipe.mixed_precision) as accelerator, kept or contextlib.nullcontext():
        check_evaluation(evaluation)
        calibration = list(batches_of(calibration)) or _first_batches(data)
        example = calibration[0].inputs if example is None else example
        bits.check(find_layers(model, example))
        own = dict(options or {})
        origin = Origin.of(target, example, command)
        job = Job(model, bits, data, target, recipe, example, calibration, evaluation, teacher, loss, output, own, origin)
        return _Run(job, accelerator, kept, tensorboard=tensorboard).to_the_end(on_epoch or (lambda _: None))


class _Run:
    """Training as it goes on: the module, its optimizer, and where they stand."""

    def __init__(self, job: Job, accelerator: Any, folder: TrainingFolder | None, *, tensorboard: bool) -> None:
        self.job, self.recipe, self.folder, self.accelerator = job, job.recipe, folder, accelerator
        self.profit = Profit(job.recipe.stages(job.bits))
        self._module: nn.Module | None = None
        self.average: Averaged | None = None
        self._with_float_weights = False
        self.history: list[EpochRecord] = []
        self.loss = job.loss or self._classification()
        self.metrics: MetricFiles | None = None
        if folder is not None and accelerator.is_main_process:
            folder.claim(job.to_json())
            self.metrics = MetricFiles(folder.path, tensorboard=tensorboard)

    @property
    def module(self) -> nn.Module:
        """What is trained; the first stage makes it."""
        assert self._module is not None
        return self._module

    def _classification(self) -> Classification:
        teacher, recipe = self.job.teacher, self.recipe
        if teacher is not None:  # the user's own keeps its mode and its device
            teacher = copy.deepcopy(teacher).to(self.accelerator.device).eval().requires_grad_(False)
        return Classification(self.job.output, recipe.label_smoothing, teacher, recipe.teacher_weight, recipe.temperature)

    def to_the_end(self, on_epoch: Callable[[EpochRecord], None]) -> Trained:
        """Every epoch that is still to do."""
        n_done = self._resume()
        if self.metrics is not None:
            self.metrics.restart(self.history)
        try:
            plan = [(index, epoch) for index, stage in enumerate(self.profit.stages) for epoch in range(stage.epochs)]
            for index, epoch in track(plan[n_done:], "training"):
                if epoch == 0:
                    self._change_bits(index)
                    changes = self.profit.stages[index].float_weights != self._with_float_weights
                    with self._correcting() if changes else contextlib.nullcontext():
                        self._set_float_weights(index)
                    self._enter(index)
                self.history.append(self._epoch(epoch))
                self._keep(index, epoch)
                if self.accelerator.is_main_process:
                    on_epoch(self.history[-1])
            return self._finish()
        finally:
            if self.metrics is not None:
                self.metrics.close()

    # Stages ---------------------------------------------------------------------------------------------------------------

    def _change_bits(self, index: int) -> None:
        """Bring the module to the bits of a stage that begins."""
        stage, job = self.profit.stages[index], self.job
        seed_all(self.recipe.seed, f"stage {index}")
        if self._module is not None:
            self._module.eval()  # as a resumed one is
            agree(self._module, self.accelerator)
        if stage.bits is None:
            self._module = copy.deepcopy(job.model)
        elif self._module is None or not is_prepared(self._module):
            source = self._module or job.model
            self._module = job.adapter.prepare(source, stage.bits, job.example, job.calibration, **job.options)
            copy_statistics(source, self._module, job.still)
        elif bits_of(self.module).layers != stage.bits.layers:
            with self._correcting():
                job.adapter.set_bits(self.module, stage.bits, job.calibration, batch_norm="kept")

    def _set_float_weights(self, index: int) -> None:
        """Leave weights in float in the stages that say so."""
        stage = self.profit.stages[index]
        self.module.to(self.accelerator.device)
        if stage.float_weights or self._with_float_weights:
            self.job.adapter.use_float_weights(self.module, stage.float_weights)
            self._with_float_weights = stage.float_weights

    def _correcting(self) -> contextlib.AbstractContextManager[None]:
        """Around what changes quantization in a prepared module; `prepare` corrects by itself."""
        if self.recipe.batch_norm != "corrected":
            return contextlib.nullcontext()
        module = self.module
        return corrected_around(module, self.job.calibration, lambda: norm_sites(module, held=self.job.still))

    def _enter(self, index: int) -> None:
        """Optimizer, average and freezing of a stage, for a module that has its bits."""
        recipe = self.recipe
        self.profit.on_stage(index, self.module)
        self.module.zero_grad()
        rates = {name: getattr(recipe, name) for name in ("learning_rate", "weight_decay", "range_factor")}
        groups = parameter_groups(self.module, **rates)
        if not any(group["params"] for group in groups):
            raise TrainingError("no parameter of the module is trainable: requires_grad is off everywhere. Turn it on.")
        self._peaks = [group["lr"] for group in groups]
        self.accelerator.free_memory()  # it would keep, and unscale, the optimizers of all stages
        self.optimizer = self.accelerator.prepare_optimizer(
            torch.optim.SGD(groups, recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)
        )
        self._parallel = in_parallel(self.module, self.accelerator)  # gives all processes the same tensors
        self.average = None if recipe.ema_decay is None else Averaged(self.module, recipe.ema_decay)

    # Epochs and steps -----------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int) -> EpochRecord:
        stage, number = self.profit.stage, len(self.history)
        start = time.perf_counter()
        losses, n_images = self._steps(epoch)
        seconds = time.perf_counter() - start
        check_finite(self.module, f"after epoch {number + 1}", self.recipe, self._latest)
        if stage.samples and self.profit.meter is not None:
            self.profit.meter.average(self._mean)
        if self.average is not None and epoch + 1 == stage.epochs:
            self.average.settle()
            self.average = None
        return EpochRecord(
            epoch=number + 1,
            stage=stage.name,
            steps=(self.history[-1].steps if self.history else 0) + len(losses),
            loss=sum(losses) / len(losses),
            learning_rate=self._rate,
            seconds=seconds,
            n_images=n_images * self.accelerator.num_processes,
            n_frozen=len(self.profit.frozen),
            accuracy=self._accuracy(),
            instability=self.profit.instability if stage.samples else {},
        )

    def _steps(self, epoch: int) -> tuple[list[float], int]:
        """All steps of an epoch of the stage: their losses, and the number of images."""
        number, name, stage = len(self.history), f"epoch {len(self.history) + 1}", self.profit.stage
        process, n_processes = self.accelerator.process_index, self.accelerator.num_processes
        seed_all(self.recipe.seed, f"epoch {number}")
        batches = Epoch(self.job.data, number, process=process, n_processes=n_processes)
        n_before = self.history[-1].steps if self.history else 0
        self.profit.on_epoch()
        self._train_mode()
        losses: list[float] = []
        n_images = 0
        for step, batch in enumerate(track(batches, f"{name}: {stage.name}", len(batches))):
            if step == 0 and process > 0:  # the order of the data is common, noise is not
                seed_all(self.recipe.seed, f"epoch {number}, process {process}")
            self._set_rates(epoch, step, len(batches))
            where = f"step {n_before + step + 1}: {batches.name_of(step)}, {name} ({stage.name})"
            losses.append(self._step(batch, where))
            n_images += len(batch)
        if not losses:
            raise DataError(f"{name} gave no batch, although its data say that they have some. Give data of that length.")
        return losses, n_images

    def _train_mode(self) -> None:
        self.module.train()
        still, is_corrected = self.job.still, self.recipe.batch_norm == "corrected"
        for name, child in self.module.named_modules():
            if name in still or (is_corrected and has_statistics(child)):
                child.eval()

    def _step(self, batch: Batch, where: str) -> float:
        """One step of the optimizer; the loss before it, over all processes."""
        batch = Batch(*to_device((batch.inputs, batch.labels), self.accelerator.device))
        self.optimizer.zero_grad()
        with self.profit.forward(), self.accelerator.autocast(), telling_lone_images(where):
            loss = self.loss(call(self._parallel, batch.inputs), batch)
        check_loss(loss)
        value = float(self._mean(loss.detach()))
        if not math.isfinite(value):
            raise TrainingError(abort_text(f"the loss is {value} at {where}", self.recipe, self._latest))
        self.accelerator.backward(loss)
        self.profit.on_step()
        if self.recipe.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return value

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.accelerator.num_processes < 2:
            return value
        mean: Tensor = self.accelerator.reduce(value.to(self.accelerator.device), reduction="mean")
        return mean

    @property
    def _latest(self) -> Path | None:
        return None if self.folder is None else self.folder.latest

    def _set_rates(self, epoch: int, step: int, n_steps: int) -> None:
        """Those of a step of an epoch of `n_steps`, by the curve of its stage, or of all stages together."""
        n_epochs = self.profit.stage.epochs
        if not self.recipe.restarts:
            epoch, n_epochs = len(self.history), self.recipe.epochs
        factor = rate_factor(epoch * n_steps + step, n_epochs * n_steps, self.recipe.warm_up)
        for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self._rate = self.recipe.learning_rate * factor

    def _accuracy(self) -> float | None:
        if self.job.evaluation is None or not self.accelerator.is_main_process:
            return None
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            return accuracy(self.module, self.job.evaluation, output=self.job.output)

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
                "history": json.dumps([asdict(record) for record in self.history]),
            }
            # Metrics first: what has no checkpoint a resumed run takes back, and what has one must have its line.
            self.metrics.add(self.history[-1])
            self.folder.save(len(self.history), self._save_module, state)
        self.accelerator.wait_for_everyone()

    def _save_module(self, path: Path) -> None:
        if is_prepared(self.module):
            self.job.adapter.save(record(self.module, origin=self.job.origin), path)
        else:
            write_torch(path, self.module.state_dict())

    def _resume(self) -> int:
        """Take up the last checkpoint of the folder; returns the number of epochs that are done."""
        latest = None if self.folder is None else self.folder.latest
        if latest is None:
            return 0
        module_path, state = TrainingFolder.read(latest)
        self.history = [EpochRecord(**item) for item in json.loads(state["history"])]
        self.profit.load_state_dict(json.loads(state["profit"]))
        stage = self.profit.stages[state["stage"]]
        with telling_damage(latest):
            if stage.bits is None:
                self._module = copy.deepcopy(self.job.model)
                self._module.load_state_dict(read_torch(module_path))
            else:
                self._module = self.job.adapter.load(self.job.model, module_path, self.job.example)
        self._with_float_weights = False  # a module that was loaded quantizes its weights
        self._set_float_weights(state["stage"])
        self._enter(state["stage"])
        if state["epoch"] + 1 < stage.epochs:
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return len(self.history)

    def _finish(self) -> Trained:
        agree(self.module, self.accelerator)
        module = self.module.to(device_of(self.job.model)).eval()
        module.zero_grad()
        is_renewed = self.recipe.batch_norm == "re-estimated"
        if is_renewed and not reestimate_batch_norm(module, self.job.calibration, held=self.job.still):
            _LOG.warning("batch_norm=re-estimated changes nothing: no normalisation of the module has statistics to estimate")
        if self.metrics is not None:
            assert self.folder is not None  # metrics are written into it
            self.job.adapter.save(record(module, origin=self.job.origin), self.folder.path / "module.pt")
        self.accelerator.wait_for_everyone()
        return Trained(module, tuple(self.history), self.profit.instability)


def _first_batches(data: TrainingData) -> list[Batch]:
    """A few batches, the same ones each time, whatever a loader draws."""
    seed_all(0, "calibration")
    items = data(0) if callable(data) else data
    seed_loader(items)
    found = list(islice(batches_of(items), _CALIBRATION_BATCHES))
    if not found:
        raise DataError("the training data are empty. Give batches of inputs and labels.")
    return found
