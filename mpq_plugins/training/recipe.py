"""How a quantized module is trained: plain values, from code or from a JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, final

from mpq_plugins.adapter.ptq import BatchNorm, with_batch_norm
from mpq_plugins.common.files import check_keys, read_fields, read_json, write_json
from mpq_plugins.common.values import Bounds, check_values
from mpq_plugins.errors import TrainingError
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.training.schedule import ProfitSchedule, Stage

FORMAT = "mpq-recipe/1"
Method = Literal["qat", "profit"]
MixedPrecision = Literal["no", "bf16", "fp16"]
Positive = Annotated[float, Bounds(above=0)]
Amount = Annotated[float, Bounds(least=0)]
Share = Annotated[float, Bounds(least=0, below=1)]


@final
@dataclass(frozen=True)
class TrainingRecipe:
    """Quantization-aware training by SGD with Nesterov momentum, warm-up and cosine decay.

    `method` "qat" trains at the target bits from the start; "profit" lowers bits and freezes layers by `profit` (Park and Yoo
    2020), scaled to `epochs` in all. `warm_up` is the share of the steps in which the rate rises; with `restarts` every stage
    rises and falls anew (as published), else all stages share one curve. `range_factor` is the
    rate of quantizer ranges relative to the weights'. `teacher_weight` and `temperature` are of the soft cross-entropy to a
    teacher, where one is given. `clip_norm` bounds the norm of all gradients together. `ema_decay` averages weights, ranges
    and statistics over the steps of a stage, and what is evaluated and kept is the average. `mixed_precision` is the arithmetic
    of the forward pass.

    `batch_norm`: running statistics are "kept" as training's batches left them; "re-estimated" at the end on the calibration
    images; or "corrected": training runs with those of the float model, moved by difference where bits change, and its batches
    neither normalise nor move them. At the end there is no correction: training moved the weights, and no float network is
    left from which quantization could be told apart.
    """

    method: Method = "qat"
    epochs: Annotated[int, Bounds(least=1)] = 20
    learning_rate: Positive = 0.01
    weight_decay: Amount = 4e-5
    momentum: Share = 0.9
    range_factor: Amount = 0.01
    warm_up: Share = 0.1
    restarts: bool = True
    label_smoothing: Share = 0.0
    teacher_weight: Amount = 1.0
    temperature: Positive = 1.0
    clip_norm: Positive | None = None
    ema_decay: Annotated[float, Bounds(above=0, below=1)] | None = None
    batch_norm: BatchNorm = "kept"
    mixed_precision: MixedPrecision = "no"
    seed: int = 0
    profit: ProfitSchedule = field(default_factory=ProfitSchedule)

    def __post_init__(self) -> None:
        check_values(TrainingRecipe, vars(self), TrainingError, where="the training recipe")

    def stages(self, bits: BitConfig) -> tuple[Stage, ...]:
        """The stages towards `bits`; raises `ModelError` when PROFIT cannot be had in so few epochs."""
        if self.method == "profit":
            return self.profit.stages(bits, epochs=self.epochs)
        return (Stage("training", self.epochs, bits),)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "format": FORMAT, "profit": {**asdict(self.profit), "widths": list(self.profit.widths)}}

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, where: str = "the training recipe") -> TrainingRecipe:
        """Inverse of `to_json`; what is left out keeps its default. Raises `FormatError` and `TrainingError`.

        `bn_reestimation`, the switch that `batch_norm` replaces, is still read.
        """
        document = with_batch_norm(document)
        names = {item.name for item in fields(cls)}
        check_keys(document, allowed={*names, "format"}, required=set(), where=where)
        values = {name: value for name, value in document.items() if name != "format"}
        if "profit" in values:
            values["profit"] = read_fields(ProfitSchedule, values["profit"], where=f"{where}: profit")
        return cls(**values)

    def save(self, path: str | Path) -> Path:
        """Write the recipe as JSON."""
        return write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> TrainingRecipe:
        """Read a recipe; raises `FormatError` and `TrainingError`."""
        return cls.from_json(read_json(path, format=FORMAT), where=str(path))


def rate_factor(step: int, n_steps: int, warm_up: float) -> float:
    """Share of the peak learning rate at step `step` (from 0) of a stage: a linear rise, then half a cosine to 0."""
    n_rising = math.floor(warm_up * n_steps)
    if step < n_rising:
        return (step + 1) / n_rising
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / max(1, n_steps - n_rising)))
