"""What quantization does to the call of one layer."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mpq_plugins.model.watch import bias_argument, input_argument


@dataclass(frozen=True)
class Steps:
    """A per-tensor activation quantizer: codes in [low, high] times `scale`."""

    scale: float
    low: int
    high: int

    def __call__(self, values: Tensor) -> Tensor:
        """`values` after quantization and back."""
        return values.div(self.scale).round_().clamp_(self.low, self.high).mul_(self.scale)


@dataclass(frozen=True)
class Perturbation:
    """The weight that a layer takes instead of its own, and the quantizer of the activation it reads, if any."""

    weight: Tensor
    activation: Steps | None = None


class AbstractCalls(TorchFunctionMode, abc.ABC):
    """Runs every torch function through `run`."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    @abc.abstractmethod
    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value of a call."""


Changes = Mapping[str, Sequence[Perturbation]]
"""Layer -> its change in every variant that runs; a single one counts for all variants."""


def run_changed(
    function: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    changes: Sequence[Perturbation],
    *,
    bias: Tensor | None = None,
    stacked: bool = False,
) -> Tensor:
    """The layer's call under each change, the results one after the other along the first axis.

    `stacked` says that the activation already holds one part per change. `bias` replaces the layer's own when given.
    """
    values = input_argument(args, kwargs)
    parts = values.chunk(len(changes)) if stacked and len(changes) > 1 else [values] * len(changes)
    bias = bias_argument(args, kwargs) if bias is None else bias
    geometry = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
    quantized: dict[Any, Tensor] = {}
    outputs: list[Tensor] = []
    for part, change in zip(parts, changes, strict=True):
        key = (id(part), change.activation)
        if key not in quantized:
            quantized[key] = part if change.activation is None else change.activation(part)
        outputs.append(function(quantized[key], change.weight, bias, *args[3:], **geometry))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
