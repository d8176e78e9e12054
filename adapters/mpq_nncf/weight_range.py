"""Weight ranges: of least squared error, where NNCF knows only the largest magnitude, or that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.wiring import LayerWiring
from mpq_plugins.adapter.ptq import WeightRange
from mpq_plugins.quantizers.uniform import mse_scale

# At 8 bits the largest magnitude is within a few percent of the best range.
_WIDEST_SEARCHED = 7


def fit_weight_ranges(module: nn.Module, layers: Iterable[LayerWiring], *, method: WeightRange) -> None:
    """Give the weight quantizers of `layers` the per-channel ranges that `method` finds for their widths, in place."""
    done: set[str] = set()
    for layer in layers:
        if layer.parameter in done:
            continue
        done.add(layer.parameter)
        quantizer = nncf_quantizers.quantizer_at(module, layer.weight[0])
        weight = module.get_parameter(layer.parameter).detach()
        searched = method == "mse" and nncf_quantizers.bits_of(quantizer) <= _WIDEST_SEARCHED
        if searched:
            nncf_quantizers.set_weight_step(quantizer, _best_step(weight, quantizer, layer))
        else:
            nncf_quantizers.set_weight_limit(quantizer, _largest(weight, layer))


def _largest(weight: Tensor, layer: LayerWiring) -> Tensor:
    others = [axis for axis in range(weight.dim()) if axis != layer.channel_axis]
    largest = weight.abs().amax(dim=others, keepdim=True)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


def _best_step(weight: Tensor, quantizer: nn.Module, layer: LayerWiring) -> Tensor:
    bits, axis = nncf_quantizers.bits_of(quantizer), layer.channel_axis
    with torch.no_grad(), _one_thread():
        return mse_scale(weight, bits, channel_axis=axis)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    # The search works on parts too small to gain from threads, and waiting for each other on a busy machine costs 10 to
    # 70 times the work.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
