"""Ranges fitted again in a module that has some: weights one by one, activations in one pass over the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas._duq import DuQTensorQuant
from mpq_brevitas._modules import get_layer
from mpq_plugins._model import Batch, call, evaluating
from mpq_plugins._ptq import ActivationRange
from mpq_plugins._quantizer import mse_range
from mpq_plugins.training._duq import activation_range as duq_range

_PERCENTILE = 0.9999900  # Brevitas' own for activations


def fit_weights(module: nn.Module, names: Iterable[str]) -> None:
    """Fit the weight ranges of the named layers to the bits they have."""
    with brevitas.guarded():
        for name in names:
            brevitas.refit_weight_scale(get_layer(module, name))


def fit_activations(module: nn.Module, batches: Sequence[Batch], rule: ActivationRange) -> None:
    """Fit every activation range to what the float model computes on `batches`, at the bits the quantizers have.

    Quantizers that share a scale get one threshold: the mean over operands and batches, or the largest with `rule` "max".
    """
    found: dict[int, list[Tensor]] = {}
    proxies = list(brevitas.activation_proxies(module))
    handles = [proxy.register_forward_hook(_observer(found.setdefault(_range_of(proxy), []), rule)) for proxy in proxies]
    try:
        with brevitas.guarded(), evaluating(module), brevitas.without_quantization(module):
            for batch in batches:
                call(module, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    for proxy in proxies:
        thresholds = found[_range_of(proxy)]
        if thresholds:
            stacked = torch.stack(thresholds)
            _set_range(proxy, stacked.max() if rule == "max" and not _is_duq(proxy) else stacked.mean())


def _range_of(proxy: Any) -> int:
    tensor_quant = brevitas.activation_tensor_quant(proxy)
    return id(tensor_quant if _is_duq(proxy) else tensor_quant.scaling_impl)


def _is_duq(proxy: Any) -> bool:
    return isinstance(brevitas.activation_tensor_quant(proxy), DuQTensorQuant)


def _observer(thresholds: list[Tensor], rule: ActivationRange) -> Callable[[Any, Any, Any], None]:
    def observe(proxy: Any, _inputs: Any, output: Any) -> None:
        values = brevitas.plain(output).detach()
        thresholds.append(_duq_threshold(proxy, values) if _is_duq(proxy) else _threshold(proxy, values, rule))

    return observe


def _duq_threshold(proxy: Any, values: Tensor) -> Tensor:
    return duq_range(values, signed=brevitas.activation_tensor_quant(proxy).duq.signed)


def _threshold(proxy: Any, values: Tensor, rule: ActivationRange) -> Tensor:
    if rule == "max":
        return values.abs().max()
    if rule == "mse":
        bits, signed = brevitas.activation_format(proxy)
        return mse_range(values, (bits,), signed=signed)[bits] * (2 ** (bits - 1) if signed else 2**bits - 1)
    rank = max(1, math.floor(_PERCENTILE * values.numel() + 0.5))
    return values.abs().flatten().kthvalue(rank).values


def _set_range(proxy: Any, threshold: Tensor) -> None:
    if _is_duq(proxy):
        brevitas.activation_tensor_quant(proxy).duq.set_range(threshold)
    else:
        brevitas.set_activation_threshold(proxy, threshold.clamp(min=1e-10))
