"""The reference quantizers of the activations that layers read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from mpq_plugins.model.run import Batch, Output, call, evaluating, select
from mpq_plugins.model.watch import AbstractWatch, LayerOfCall, input_argument
from mpq_plugins.proxies.measuring.perturbation import Steps
from mpq_plugins.quantizers.uniform import mse_range
from mpq_plugins.space.space import Space


def activation_steps(
    model: nn.Module, space: Space, owner: LayerOfCall, batch: Batch, output: Output
) -> dict[tuple[str, int], Steps]:
    """Per-tensor quantizers of least squared error for the input of every layer, by layer and activation bits.

    One batch decides; layers called several times take the widest range. Raises `DataError`.
    """
    bits = {name: sorted({choice.activation for choice in unit.choices}) for unit in space.units for name in unit.layers}
    watch = _RangeWatch(owner, bits)
    with evaluating(model), owner, watch:
        select(call(model, batch.inputs), output)
    return watch.found


@final
class _RangeWatch(AbstractWatch):
    def __init__(self, owner: LayerOfCall, bits: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], Steps] = {}
        self._owner, self._bits = owner, bits

    def before_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        layer = self._owner.name(args, kwargs)
        if layer is None:
            return
        values: Tensor = input_argument(args, kwargs)
        signed = bool(values.amin() < 0)
        for bits, scale in mse_range(values, self._bits[layer], signed=signed).items():
            low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
            steps = Steps(float(scale), low, high)
            held = self.found.get((layer, bits))
            if held is None or held.scale * held.high < steps.scale * steps.high or held.low > steps.low:
                self.found[layer, bits] = steps

    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """Nothing is read of outputs."""
