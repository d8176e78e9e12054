"""The handle of a quantized model, and the one call that makes it."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_plugins.adapter.base import AbstractAdapter, bits_of
from mpq_plugins.adapter.checkpoint import read_origin
from mpq_plugins.adapter.evaluate import accuracy, exported_accuracy, output_index
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.record import Origin, record
from mpq_plugins.adapter.repairs import Repair, repairs_of
from mpq_plugins.adapter.verify import Verification, verify
from mpq_plugins.allocation import Allocation, allocate
from mpq_plugins.common.plugins import make, resolve
from mpq_plugins.costs.budgets import Budgets
from mpq_plugins.errors import AdapterError, DataError
from mpq_plugins.model.run import Batch, Output, batches_of, first_batch
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.training.epochs import TrainingData
from mpq_plugins.training.loop import Trained, train
from mpq_plugins.training.recipe import TrainingRecipe

_ROWS = 32  # images in a batch of one tensor


@final
@dataclass(eq=False)
class QuantizedModel:
    """A quantized module with what its next steps need: adapter, example, bits, and the float model it came from.

    `module` is an ordinary `nn.Module`: train it, wrap it in DistributedDataParallel, compile it or average it. The handle can
    be pickled and copied; Brevitas modules alone cannot be pickled. `allocation` is None for a handle that was loaded.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
        >>> q = mpq.quantize(model, torch.randn(32, 16), budgets="size=w4", adapter="brevitas")
        >>> mpq.QuantizedModel.load(q.save("q.pt"), model).bits == q.bits
        True
    """

    module: nn.Module
    adapter: AbstractAdapter
    example: Any
    model: nn.Module
    allocation: Allocation | None = None

    @property
    def bits(self) -> BitConfig:
        """Layer -> precision, as prepared or switched last."""
        return bits_of(self.module)

    @property
    def repairs(self) -> tuple[Repair, ...]:
        """What was repaired after quantization, with the distances to the float network that decided about it."""
        return repairs_of(self.module)

    @property
    def report(self) -> str:
        """What was done, a few lines."""
        widths = sorted({precision.weight for precision in self.bits.layers.values()})
        lines = [f"{len(self.bits.layers)} layers at {', '.join(map(str, widths))} weight bits by {self.adapter.name}"]
        if self.allocation is not None:
            lines.append(str(self.allocation))
        return "\n".join([*lines, *map(str, self.repairs)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The quantized module's outputs."""
        return self.module(*args, **kwargs)

    def __repr__(self) -> str:
        return f"QuantizedModel({self.report.splitlines()[0]}; module {type(self.module).__name__})"

    def export(self, path: str | Path, format: str | None = None) -> Exported:
        """Write the module for its runtime, whole or not at all; `format` is one of `adapter.formats`, the first by default.

        Raises `AdapterError` and `WriteError`.
        """
        return Exported(self.adapter.export(self.module, path, self.example, format=format), self)

    def save(self, path: str | Path, *, command: Mapping[str, Any] | None = None) -> Path:
        """Write a checkpoint that knows its adapter and example; `command` are options that later commands take over."""
        record(self.module, origin=Origin.of(self.adapter, self.example, command))
        return self.adapter.save(self.module, path)

    @classmethod
    def load(
        cls, path: str | Path, model: nn.Module, *, adapter: AbstractAdapter | str | None = None, example: Any = None
    ) -> QuantizedModel:
        """The handle of a checkpoint, built on the float `model`; adapter and example are the file's unless given.

        Raises `FormatError`, `FingerprintError` for another model, and `AdapterError` for a file that says neither.
        """
        name, origin = read_origin(path)
        if adapter is None:
            adapter = make("adapters", name, {} if origin is None else origin.facts["options"])
        found: AbstractAdapter = resolve("adapters", adapter)
        if example is None and origin is None:
            raise AdapterError(f"{path} was written without an example of the model's input. Give example=.")
        example = origin.example if example is None and origin is not None else example
        return cls(found.load(model, path, example), found, example, model)

    def set_bits(self, bits: BitConfig, data: Any = ()) -> QuantizedModel:
        """Switch the module in place to other bits, with ranges and statistics from `data`; returns the handle."""
        self.adapter.set_bits(self.module, bits, _batches(data) if isinstance(data, Tensor) or data else ())
        return self

    def train(
        self, data: TrainingData, recipe: TrainingRecipe | None = None, *, calibration: Any = (), **options: Any
    ) -> Trained:
        """Train at these bits, from the float model on, as `mpq_plugins.training.train` does; the handle takes the result.

        `options` are those of `train`, such as `teacher`, `evaluation`, `folder` and `loss`.
        """
        if calibration is not None and (isinstance(calibration, Tensor) or calibration):
            options["calibration"] = _batches(calibration)
        trained = train(self.model, self.bits, data, adapter=self.adapter, recipe=recipe, example=self.example, **options)
        self.module = trained.module
        return trained

    def accuracy(self, data: Iterable[Any], *, output: Output = None) -> float:
        """Share of labelled images whose largest logit is at their label."""
        return accuracy(self.module, data, output=output)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModel:
        return QuantizedModel(copy.deepcopy(self.module, memo), self.adapter, self.example, self.model, self.allocation)

    def __reduce__(self) -> tuple[Any, ...]:
        with tempfile.TemporaryDirectory() as folder:
            kept = self.save(Path(folder) / "module.pt").read_bytes()
        return _restored, (kept, self.adapter, self.example, self.model, self.allocation, self.module.training)


def _restored(
    kept: bytes, adapter: AbstractAdapter, example: Any, model: nn.Module, allocation: Allocation | None, training: bool
) -> QuantizedModel:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.pt"
        path.write_bytes(kept)
        module = adapter.load(model, path, example).train(training)
    return QuantizedModel(module, adapter, example, model, allocation)


@final
@dataclass(frozen=True, eq=False)
class Exported:
    """An exported file, and the handle that it came from."""

    path: Path
    source: QuantizedModel

    def verify(self, inputs: Any = None, *, tolerance: float = 1e-3) -> Verification:
        """Read the file back: bits, weight codes, outputs and budgets; raises `VerificationError` where they differ."""
        own = self.source
        inputs = own.example if inputs is None else inputs
        found = verify(own.adapter, self.path, own.bits, module=own.module, inputs=inputs, model=own.model, tolerance=tolerance)
        found.check()
        return found

    def read_bits(self) -> BitConfig:
        """The bits that the file holds, from the file alone."""
        return self.source.adapter.read_bits(self.path)

    def run(self, inputs: Any) -> list[Any]:
        """Outputs of the file in its own runtime, as numpy arrays."""
        return self.source.adapter.run(self.path, inputs)

    def accuracy(self, data: Iterable[Any], *, output: Output = None) -> float:
        """Share of labelled images whose largest logit is at their label, by the file in its own runtime."""
        own = self.source
        index = None if output is None else output_index(own.module, own.example, output)
        return exported_accuracy(own.adapter, self.path, data, output=index)


def quantize(
    model: nn.Module,
    data: Any,
    *,
    budgets: Budgets,
    adapter: AbstractAdapter | str,
    example: Any = None,
    calibration: Any = None,
    n_images: int = 256,
    ptq: PTQ | Mapping[str, Any] | None = None,
    **search: Any,
) -> QuantizedModel:
    """Allocate bits under `budgets`, quantize the model with them, repair it, and return the handle.

    Args:
        model: a float torch model; it stays as it is.
        data: a tensor [N, ...] of inputs, a list of batches, or a DataLoader; only some proxies look at labels.
        budgets: `"size=w4"`, `{"size": "w4", "bops": "60%"}`, or `Budget` objects.
        adapter: `"nncf"`, `"brevitas"`, or an adapter with options.
        example: one input as the model takes it; by default the first image of `data`.
        calibration: data for ranges and repairs; by default `data`.
        n_images: at most so many images of `data` and of `calibration` are looked at.
        ptq: options of post-training quantization (see `PTQ`).
        search: further arguments of `allocate`, such as `proxy`, `choices`, `pin`, `exclude`, `strict`, `cache`.

    Raises what `allocate` and the adapter's `prepare` raise, before long work where it can be known.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        >>> q = mpq.quantize(model.eval(), torch.randn(32, 1, 4, 4), budgets="size=w4", adapter="brevitas")
        >>> sorted(q.bits.layers)
        ['1', '3']
    """
    chosen: AbstractAdapter = resolve("adapters", adapter)
    batches = _batches(data, n_images)
    example = batches[0].part(0, 1).inputs if example is None else example
    options = asdict(ptq) if isinstance(ptq, PTQ) else dict(ptq or {})
    PTQ.of(options)  # refused before anything is scored
    to_prepare = batches if calibration is None else _batches(calibration, n_images)
    allocation = allocate(model, example, batches, budgets=budgets, adapter=chosen, **search)
    module = chosen.prepare(model, allocation.bits, example, to_prepare, **options)
    return QuantizedModel(module, chosen, example, model, allocation)


def _batches(data: Any, n_images: int | None = None) -> list[Batch]:
    """Batches of a tensor of rows, a list or a loader, until they hold `n_images`."""
    if isinstance(data, Tensor):
        if data.dim() < 2:
            raise DataError(f"data of shape {tuple(data.shape)} has no rows of inputs. Give a tensor [N, ...], or batches.")
        data = torch.split(data, _ROWS)
    first_batch(data, purpose="quantize")
    found, n_found = [], 0
    for batch in batches_of(data):
        found.append(batch)
        n_found += len(batch)
        if n_images is not None and n_found >= n_images:
            break
    return found
