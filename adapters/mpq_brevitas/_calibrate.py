"""From a converted module to a usable one: ranges, bias correction, batch-normalisation statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas._modules import get_layer, set_layer
from mpq_plugins._bits import BitConfig
from mpq_plugins._layers import Inventory
from mpq_plugins._model import Batch, call
from mpq_plugins.training import reestimate_batch_norm


def calibrate(module: nn.Module, batches: Sequence[Batch]) -> None:
    """Set activation ranges over `batches`, then weight ranges."""
    from brevitas.graph.calibrate import calibration_mode

    with brevitas.guarded(), torch.no_grad():
        with calibration_mode(module):
            for batch in batches:
                call(module, batch.inputs)
        module.eval()
        # MSE ranges of the weights are searched in the first quantized forward pass.
        call(module, batches[0].inputs)


def correctable(bits: BitConfig, inventory: Inventory, *, normed: bool = False) -> tuple[str, ...]:
    """Layers whose bias Brevitas can correct with an effect: called once, and no batch normalisation behind.

    Re-estimated statistics of a batch normalisation already centre the layer before it; with `normed` such layers count too.
    """
    return tuple(
        layer.name
        for layer in inventory
        if layer.name in bits.layers and layer.n_calls == 1 and (normed or not layer.n_norm_parameters)
    )


def correct_bias(module: nn.Module, names: Iterable[str], batches: Sequence[Batch]) -> None:
    """Add to the biases of the named layers what quantization takes from their mean output; Brevitas' method.

    Layers without a bias stay without one, so that the module keeps the parameters of the float model.
    """
    from brevitas.graph.calibrate import bias_correction_mode

    layers = [get_layer(module, name) for name in names]
    corrected = [layer for layer in layers if layer.bias is not None]
    if not corrected:
        return
    with brevitas.guarded(), torch.no_grad(), contextlib.ExitStack() as modes:
        for layer in corrected:
            modes.enter_context(bias_correction_mode(layer, skip_if_no_bias=True))
        for batch in batches:
            call(module, batch.inputs)
    module.eval()


def reestimate_merged_norms(module: nn.Module, merged: Mapping[str, nn.Module], batches: Sequence[Batch]) -> None:
    """Batch-normalisation re-estimation for layers into which the normalisation is already merged.

    Each merged layer is followed, for the time of the estimation, by a normalisation with the affine parameters of
    the one it swallowed; the statistics found are then folded in. Scaling a channel's weights, and its scale with
    them, changes no weight code.
    """
    chains = {name: _ThenNorm(get_layer(module, name), norm) for name, norm in merged.items()}
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

    def forward(self, x: Any) -> Any:
        merged = brevitas.plain(self.layer(x))
        return self.norm(merged * self.unmerge.view(-1, *[1] * (merged.dim() - 2)))


def _or(value: Tensor | None, default: float, like: Tensor) -> Tensor:
    return torch.full_like(like, default) if value is None else value


@contextlib.contextmanager
def _replaced(module: nn.Module, replacements: Mapping[str, _ThenNorm]) -> Iterator[None]:
    for name, chain in replacements.items():
        set_layer(module, name, chain)
    try:
        yield
    finally:
        for name, chain in replacements.items():
            set_layer(module, name, chain.layer)


@torch.no_grad()
def _fold(chain: _ThenNorm) -> None:
    layer, norm = chain.layer, chain.norm
    slope = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    bias = torch.zeros_like(slope) if layer.bias is None else layer.bias
    folded = (bias * chain.unmerge - norm.running_mean) * slope + norm.bias
    layer.bias = nn.Parameter(folded, requires_grad=layer.weight.requires_grad)
    # A channel whose affine weight is 0 has weights 0 already; its scale must not become 0.
    factor = torch.where(slope > 0, slope * chain.unmerge, torch.ones_like(slope))
    shape = [1] * layer.weight.dim()
    shape[layer.output_channel_dim] = -1
    layer.weight.mul_(factor.view(shape))
    scale = brevitas.learned_scale(layer.weight_quant)
    if scale is not None:
        scale.mul_(factor.view(scale.shape))
