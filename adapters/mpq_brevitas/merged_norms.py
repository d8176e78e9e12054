"""Corrections and statistics of batch normalisations that are merged into layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_brevitas import internals as brevitas
from mpq_plugins.model.run import Batch
from mpq_plugins.quantizers.batch_norm import AbstractSite, Shift, reestimate_batch_norm


@final
class MergedSite(AbstractSite):
    """A layer into which a normalisation is merged: the correction of that is folded into weights and bias.

    With o the layer's output, b the normalisation's bias and r the trained deviation over the moved one, the corrected
    normalisation gives (o - b - shift) r + b. Scaling a channel's weights, and its scale with them, changes no weight code.
    """

    def __init__(self, layer: Any, swallowed: Any) -> None:
        super().__init__()
        self.axis = 1 - layer.weight.dim()
        self._layer, self._norm = layer, swallowed
        self._scale = brevitas.learned_scale(layer.weight_quant)
        self._trained = [
            (tensor, tensor.detach().clone()) for tensor in (layer.weight, layer.bias, self._scale) if tensor is not None
        ]

    def corrected(self, values: Any, shift: Shift) -> Tensor:
        """See `AbstractSite.corrected`."""
        factor, offset = self._map(shift)
        shape = [-1, *[1] * (-1 - self.axis)]
        return brevitas.plain(values) * factor.reshape(shape) + offset.reshape(shape)

    def finish(self) -> None:
        """See `AbstractSite.finish`."""
        self.undo()
        if self.shift is None:
            return
        factor, offset = self._map(self.shift)
        _scale_channels(self._layer, factor)
        self._layer.bias.mul_(factor).add_(offset)

    def undo(self) -> None:
        """See `AbstractSite.undo`."""
        for tensor, before in self._trained:
            tensor.copy_(before)

    def _map(self, shift: Shift) -> tuple[Tensor, Tensor]:
        """Factor and offset of the output.  # [channel] both"""
        norm, like = self._norm, self._layer.weight
        variance = norm.running_var.to(like)
        factor = torch.sqrt((variance + norm.eps) / (variance * shift.log_ratio.exp().to(like) + norm.eps))
        bias = _or(norm.bias, 0.0, factor).to(like)
        return factor, (1 - factor) * bias - factor * shift.mean.to(like)


def reestimate_merged_norms(module: nn.Module, merged: Mapping[str, nn.Module], batches: Sequence[Batch]) -> None:
    """Batch-normalisation re-estimation for layers into which the normalisation is already merged.

    Each merged layer is followed, for the time of the estimation, by a normalisation with the affine parameters of
    the one it swallowed; the statistics found are then folded in. Scaling a channel's weights, and its scale with
    them, changes no weight code.
    """
    chains = {name: _ThenNorm(module.get_submodule(name), norm) for name, norm in merged.items()}
    if not chains:
        return
    with _replaced(module, chains), brevitas.guarded():
        n_batches = reestimate_batch_norm(module, batches)
    if n_batches:
        for chain in chains.values():
            _fold(chain)


class _ThenNorm(nn.Module):
    """A merged layer, its output brought back to what the normalisation once read, and that normalisation again."""

    def __init__(self, layer: Any, swallowed: Any) -> None:
        super().__init__()
        self.layer = layer
        self.norm = type(swallowed)(swallowed.num_features, eps=swallowed.eps).to(layer.weight.device)
        with torch.no_grad():
            # The sign of the affine weight stays in the merged weights.
            self.norm.weight.copy_(_or(swallowed.weight, 1.0, self.norm.weight).abs())
            self.norm.bias.copy_(_or(swallowed.bias, 0.0, self.norm.bias))
            deviation = torch.sqrt(swallowed.running_var + swallowed.eps)
            self.unmerge = torch.where(self.norm.weight > 0, deviation / self.norm.weight, torch.ones_like(deviation))

    def forward(self, input: Any) -> Any:  # the name by which the layer in its place may be called
        merged = brevitas.plain(self.layer(input))
        return self.norm(merged * self.unmerge.view(-1, *[1] * (merged.dim() - 2)))


def _or(value: Tensor | None, default: float, like: Tensor) -> Tensor:
    return torch.full_like(like, default) if value is None else value


@contextlib.contextmanager
def _replaced(module: nn.Module, replacements: Mapping[str, _ThenNorm]) -> Iterator[None]:
    for name, chain in replacements.items():
        module.set_submodule(name, chain)
    try:
        yield
    finally:
        for name, chain in replacements.items():
            module.set_submodule(name, chain.layer)


@torch.no_grad()
def _fold(chain: _ThenNorm) -> None:
    layer, norm = chain.layer, chain.norm
    slope = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = torch.zeros_like(slope) if layer.bias is None else layer.bias
    folded = (bias * chain.unmerge - norm.running_mean) * slope + norm.bias
    layer.bias = nn.Parameter(folded, requires_grad=layer.weight.requires_grad)
    # A channel whose affine weight is 0 has weights 0 already; its scale must not become 0.
    _scale_channels(layer, torch.where(slope > 0, slope * chain.unmerge, torch.ones_like(slope)))


def _scale_channels(layer: Any, factor: Tensor) -> None:
    """Multiply the weights of every output channel, and its scale; the codes stay."""
    shape = [1] * layer.weight.dim()
    shape[layer.output_channel_dim] = -1
    layer.weight.mul_(factor.view(shape))
    scale = brevitas.learned_scale(layer.weight_quant)
    if scale is not None:
        scale.mul_(factor.view(scale.shape))
