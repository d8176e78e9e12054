"""What a training run was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, final

from torch import nn

from mpq_plugins.adapter.base import AbstractAdapter
from mpq_plugins.adapter.record import Origin
from mpq_plugins.model.run import Batch, Output
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.training.epochs import TrainingData
from mpq_plugins.training.loss import Loss
from mpq_plugins.training.recipe import TrainingRecipe


@final
@dataclass(frozen=True)
class Job:
    """The arguments of `train`, made complete."""

    model: nn.Module
    bits: BitConfig
    data: TrainingData
    adapter: AbstractAdapter
    recipe: TrainingRecipe
    example: Any
    calibration: Sequence[Batch]
    evaluation: Iterable[Any] | None
    teacher: nn.Module | None
    loss: Loss | None
    output: Output
    options: Mapping[str, Any]
    origin: Origin

    @property
    def still(self) -> frozenset[str]:
        """Modules that the user holds in evaluation mode inside a model in training mode, by name."""
        if not self.model.training:  # the mode of the whole says nothing about its parts
            return frozenset()
        return frozenset(name for name, module in self.model.named_modules() if not module.training)

    def to_json(self) -> dict[str, Any]:
        """What a resumed run must have in common with the first."""
        own: list[str] = [item.name for item in fields(self.adapter)] if is_dataclass(self.adapter) else []
        adapter = {name: getattr(self.adapter, name) for name in own}
        return {
            "adapter": {"name": self.adapter.name, **adapter},
            "bits": {key: self.bits.to_json()[key] for key in ("fingerprint", "layers")},
            # Without calibration data of their own these are of the training data, and tell their batch size.
            "calibration": {"batches": len(self.calibration), "images": sum(len(batch) for batch in self.calibration)},
            "options": dict(self.options),
            "recipe": self.recipe.to_json(),
            "teacher": None if self.teacher is None else type(self.teacher).__name__,
        }
