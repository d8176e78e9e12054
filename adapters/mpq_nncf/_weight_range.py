"""Weight ranges with the least squared error, where NNCF knows only the largest magnitude."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mpq_nncf import _nncf_internals as internals
from mpq_nncf._wiring import Wiring
from mpq_plugins._precision import Precision
from mpq_plugins._quantizer import mse_scale

# At 8 bits the largest magnitude is within a few percent of the best range.
_WIDEST_SEARCHED = 7
_CACHE_SIZED = 2**16  # elements; a search over whole layers streams them from memory 80 times


def set_weight_ranges(module: nn.Module, wiring: Wiring, bits: Mapping[str, Precision]) -> None:
    """Give the weight quantizer of every layer below 8 bits the per-channel step of least squared error."""
    done: set[str] = set()
    for name, layer in wiring.items():
        if bits[name].weight > _WIDEST_SEARCHED or layer.parameter in done:
            continue
        done.add(layer.parameter)
        weight = module.get_parameter(layer.parameter).detach()
        with torch.no_grad(), _one_thread():
            step = torch.cat(
                [
                    mse_scale(part, bits[name].weight, channel_axis=layer.channel_axis)
                    for part in _cache_sized(weight, layer.channel_axis)
                ],
                dim=layer.channel_axis,
            )
        internals.set_weight_step(internals.quantizer_at(module, layer.weight[0]), step)


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
