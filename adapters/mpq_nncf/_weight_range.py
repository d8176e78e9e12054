"""Weight ranges: of least squared error, where NNCF knows only the largest magnitude, or that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mpq_nncf import _nncf_internals as internals
from mpq_nncf._wiring import LayerWiring
from mpq_plugins._ptq import WeightRange
from mpq_plugins._quantizer import mse_scale

# At 8 bits the largest magnitude is within a few percent of the best range.
_WIDEST_SEARCHED = 7
_CACHE_SIZED = 2**16  # elements; a search over whole layers streams them from memory 80 times


def fit_weight_ranges(module: nn.Module, layers: Iterable[LayerWiring], *, method: WeightRange) -> None:
    """Give the weight quantizers of `layers` the per-channel ranges that `method` finds for their widths, in place."""
    done: set[str] = set()
    for layer in layers:
        if layer.parameter in done:
            continue
        done.add(layer.parameter)
        quantizer = internals.quantizer_at(module, layer.weight[0])
        weight = module.get_parameter(layer.parameter).detach()
        searched = method == "mse" and internals.bits_of(quantizer) <= _WIDEST_SEARCHED
        if searched:
            internals.set_weight_step(quantizer, _best_step(weight, quantizer, layer))
        else:
            internals.set_weight_limit(quantizer, _largest(weight, layer))


def _largest(weight: Tensor, layer: LayerWiring) -> Tensor:
    others = [axis for axis in range(weight.dim()) if axis != layer.channel_axis]
    largest = weight.abs().amax(dim=others, keepdim=True)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _best_step(weight: Tensor, quantizer: nn.Module, layer: LayerWiring) -> Tensor:
    bits, axis = internals.bits_of(quantizer), layer.channel_axis
    with torch.no_grad(), _one_thread():
        return torch.cat([mse_scale(part, bits, channel_axis=axis) for part in _cache_sized(weight, axis)], dim=axis)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # Parts this small gain nothing from threads, and waiting for each other on a busy machine costs them 10 to 70 times.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _cache_sized(weight: Tensor, channel_axis: int) -> tuple[Tensor, ...]:
    per_channel = weight.numel() // weight.shape[channel_axis]
    parts: tuple[Tensor, ...] = weight.split(max(1, _CACHE_SIZED // per_channel), dim=channel_axis)
    return parts
