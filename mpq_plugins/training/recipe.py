"""How a quantized module is trained: plain values, from code or from a JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, final, get_args

from mpq_plugins.common.files import check_keys, read_json, write_json
from mpq_plugins.errors import FormatError, TrainingError
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.training.schedule import ProfitSchedule, Stage

FORMAT = "mpq-recipe/1"
Method = Literal["qat", "profit"]
MixedPrecision = Literal["no", "bf16", "fp16"]
BatchNorm = Literal["kept", "re-estimated", "corrected"]
# Recipes written before it have a switch, `bn_reestimation`.
_BEFORE = {True: "re-estimated", False: "kept"}


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
    epochs: int = 20
    learning_rate: float = 0.01
    weight_decay: float = 4e-5
    momentum: float = 0.9
    range_factor: float = 0.01
    warm_up: float = 0.1
    restarts: bool = True
    label_smoothing: float = 0.0
    teacher_weight: float = 1.0
    temperature: float = 1.0
    clip_norm: float | None = None
    ema_decay: float | None = None
    batch_norm: BatchNorm = "kept"
    mixed_precision: MixedPrecision = "no"
    seed: int = 0
    profit: ProfitSchedule = field(default_factory=ProfitSchedule)

    def __post_init__(self) -> None:
        self._check(self.method in get_args(Method), "method", f"one of {', '.join(get_args(Method))}")
        self._check(self.mixed_precision in get_args(MixedPrecision), "mixed_precision", "no, bf16 or fp16")
        self._check(self.batch_norm in get_args(BatchNorm), "batch_norm", f"one of {', '.join(get_args(BatchNorm))}")
        self._check(_is_whole(self.epochs) and self.epochs >= 1, "epochs", "a whole number of at least 1")
        for name in ("learning_rate", "temperature"):
            self._check(_is_number(getattr(self, name)) and getattr(self, name) > 0, name, "a number above 0")
        for name in ("weight_decay", "range_factor", "teacher_weight"):
            self._check(_is_number(getattr(self, name)) and getattr(self, name) >= 0, name, "a number of at least 0")
        for name in ("momentum", "label_smoothing", "warm_up"):
            self._check(_is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
        decay, bound = self.ema_decay, self.clip_norm
        self._check(decay is None or (_is_number(decay) and 0 < decay < 1), "ema_decay", "between 0 and 1, or null")
        self._check(bound is None or (_is_number(bound) and bound > 0), "clip_norm", "a number above 0, or null")
        self._check(isinstance(self.restarts, bool), "restarts", "true or false")
        self._check(_is_whole(self.seed), "seed", "a whole number")

    def _check(self, holds: bool, name: str, what: str) -> None:
        if not holds:
            raise TrainingError(f"{name} of a training recipe must be {what}, not {getattr(self, name)!r}.")

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
        if isinstance(document.get("bn_reestimation"), bool) and "batch_norm" not in document:
            rest = {name: value for name, value in document.items() if name != "bn_reestimation"}
            document = {**rest, "batch_norm": _BEFORE[document["bn_reestimation"]]}
        names = {item.name for item in fields(cls)}
        check_keys(document, allowed={*names, "format"}, required=set(), where=where)
        values = {name: value for name, value in document.items() if name != "format"}
        if "profit" in values:
            values["profit"] = _schedule(values["profit"], where=f"{where}: profit")
        return cls(**values)

    def save(self, path: str | Path) -> Path:
        """Write the recipe as JSON."""
        return write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> TrainingRecipe:
        """Read a recipe; raises `FormatError` and `TrainingError`."""
        return cls.from_json(read_json(path, format=FORMAT), where=str(path))


def _schedule(document: object, *, where: str) -> ProfitSchedule:
    check_keys(document, allowed={item.name for item in fields(ProfitSchedule)}, required=set(), where=where)
    assert isinstance(document, dict)  # checked
    values: dict[str, Any] = dict(document)
    for name, value in values.items():
        if name == "widths":
            holds = isinstance(value, (list, tuple)) and all(_is_whole(width) and width >= 2 for width in value)
            what, values[name] = "a list of whole numbers of at least 2", tuple(value) if holds else value
        else:
            holds, what = _is_whole(value) and value >= (name == "parts"), "a whole number, of epochs or of parts"
        if not holds:
            raise FormatError(f"{where}: {name} must be {what}, not {value!r}.")
    return ProfitSchedule(**values)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def rate_factor(step: int, n_steps: int, warm_up: float) -> float:
    """Share of the peak learning rate at step `step` (from 0) of a stage: a linear rise, then half a cosine to 0."""
    n_rising = math.floor(warm_up * n_steps)
    if step < n_rising:
        return (step + 1) / n_rising
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / max(1, n_steps - n_rising)))
