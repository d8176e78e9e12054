"""The quantized weights and activation quantizers of every unit at every choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_plugins.errors import ModelError
from mpq_plugins.model.run import Batch, Output, call, evaluating, select
from mpq_plugins.model.watch import AbstractWatch, LayerOfCall, input_argument
from mpq_plugins.proxies.measuring.perturbation import Perturbation, Steps
from mpq_plugins.quantizers.uniform import mse_range, mse_scales, quantize
from mpq_plugins.space.precision import Precision
from mpq_plugins.space.space import Space


@final
class QuantizedWeights:
    """What every choice of a space makes of a model's layers, with the reference quantizer.

    Weights are symmetric at the step of least squared error, per output channel or per tensor; scales are found once, and
    quantized weights are kept while they fit into `cache_bytes`. `activations` holds the quantizers of the activation that
    a layer reads, by layer and bits; without one the activation stays in float. `factors` holds, by layer, the factor per
    output channel of a batch normalisation that runs merge into the layer.
    """

    def __init__(self, model: nn.Module, space: Space, *, per_channel: bool = True, cache_bytes: int = 0) -> None:
        self.activations: dict[tuple[str, int], Steps] = {}
        self.factors: Mapping[str, Tensor] = {}
        self._model, self._space = model, space
        self._per_channel = per_channel
        self._scales: dict[str, dict[int, Tensor]] = {}
        self._cache: dict[tuple[str, int, bool], Tensor] = {}
        self._free_bytes = cache_bytes

    def own(self, layer: str) -> Tensor:
        """The float weight of a layer. Raises `ModelError` where it is not finite."""
        value: Any = self._model
        for part in self._space.layer(layer).weight_name.split("."):
            value = getattr(value, part)
        weight: Tensor = value.detach()
        if layer not in self._scales and not bool(weight.isfinite().all()):
            n_bad = int((~weight.isfinite()).sum())
            raise ModelError(
                f"the weight of {layer} holds {n_bad} values that are not finite, of {weight.numel()}. Load another checkpoint."
            )
        return weight

    def weight(self, layer: str, bits: int) -> Tensor:
        """The weight of a layer after quantization to `bits` and back."""
        weight = self.own(layer)
        scale = self._scales_of(layer, weight)[bits]
        return quantize(weight, scale, bits).mul_(scale)

    def delta(self, layer: str, bits: int) -> Tensor:
        """What quantization adds to the weight of a layer."""
        return self.weight(layer, bits) - self.own(layer)

    def changes(self, unit: int, choices: Iterable[int], *, merged: bool) -> dict[str, list[Perturbation]]:
        """What choices make of all layers of a unit; `merged` with the factors of their batch normalisations."""
        members = self._space.units[unit]
        return {name: [self._change(name, members.choices[choice], merged) for choice in choices] for name in members.layers}

    def _change(self, layer: str, precision: Precision, merged: bool) -> Perturbation:
        activation = self.activations.get((layer, precision.activation))
        return Perturbation(self._ready(layer, precision.weight, merged and layer in self.factors), activation)

    def _ready(self, layer: str, bits: int, merged: bool) -> Tensor:
        key = (layer, bits, merged)
        if key in self._cache:
            return self._cache[key]
        weight = self.weight(layer, bits)
        if merged:
            weight.mul_(self.factors[layer].reshape(-1, *[1] * (weight.dim() - 1)))
        size = weight.numel() * weight.element_size()
        if size <= self._free_bytes:
            self._cache[key] = weight
            self._free_bytes -= size
        return weight

    def _scales_of(self, layer: str, weight: Tensor) -> Mapping[int, Tensor]:
        if layer not in self._scales:
            bits = sorted({choice.weight for unit in self._space.units if layer in unit.layers for choice in unit.choices})
            axis = (1 if self._space.layer(layer).kind.startswith("ConvTranspose") else 0) if self._per_channel else None
            with torch.no_grad():
                self._scales[layer] = mse_scales(weight, bits, channel_axis=axis)
        return self._scales[layer]


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
