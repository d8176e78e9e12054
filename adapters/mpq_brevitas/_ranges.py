"""Ranges fitted again in a module that has some: weights one by one, activations in one pass over the data."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas._duq import DuQTensorQuant
from mpq_brevitas._modules import get_layer
from mpq_plugins._errors import DataError
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


def restart_weights(module: nn.Module, names: Iterable[str]) -> None:
    """Give the named layers the weight ranges that preparing the module with the weights of now would give."""
    names = list(names)
    for name in names:
        layer = get_layer(module, name)
        if isinstance(layer.weight_quant.tensor_quant, DuQTensorQuant):
            layer.weight_quant.tensor_quant.duq.calibrate_weight(layer.weight)
    fit_weights(module, names)


def fit_activations(module: nn.Module, batches: Iterable[Batch], rule: ActivationRange) -> None:
    """Fit every activation range to what the float model computes on `batches`, at the bits the quantizers have."""
    widths = {proxy: brevitas.activation_format(proxy)[0] for proxy in brevitas.activation_proxies(module)}
    # Normalisation statistics are still those of the float model.
    with brevitas.without_quantization(module):
        thresholds = measured(module, widths, batches, rule)
    set_thresholds(thresholds)


def measured(
    module: nn.Module, widths: Mapping[Any, int], batches: Iterable[Batch], rule: ActivationRange
) -> dict[Any, Tensor]:
    """Thresholds of the activation quantizers in `widths` for these widths, from what reaches them as the module stands now.

    Quantizers that share a scale get one threshold: the mean over operands and batches, or the largest with `rule` "max".
    Quantizers that nothing reaches, or all of them without batches, have none. Raises `DataError` for NaN and infinity.
    """
    found: dict[int, list[Tensor]] = {}
    with contextlib.ExitStack() as stack:
        for proxy, width in widths.items():
            hook = _observer(width, found.setdefault(_range_of(proxy), []), rule)
            stack.callback(proxy.register_forward_pre_hook(hook).remove)
        stack.enter_context(brevitas.guarded())
        stack.enter_context(evaluating(module))
        for batch in batches:
            call(module, batch.inputs)
    return {proxy: _joined(proxy, found[_range_of(proxy)], rule) for proxy in widths if found[_range_of(proxy)]}


def set_thresholds(thresholds: Mapping[Any, Tensor]) -> None:
    """Give activation quantizers the thresholds that `measured` found."""
    for proxy, threshold in thresholds.items():
        if _is_duq(proxy):
            brevitas.activation_tensor_quant(proxy).duq.set_range(threshold)
        else:
            brevitas.set_activation_threshold(proxy, threshold.clamp(min=1e-10))


def _joined(proxy: Any, thresholds: list[Tensor], rule: ActivationRange) -> Tensor:
    stacked = torch.stack(thresholds)
    return stacked.max() if rule == "max" and not _is_duq(proxy) else stacked.mean()


def _range_of(proxy: Any) -> int:
    tensor_quant = brevitas.activation_tensor_quant(proxy)
    return id(tensor_quant if _is_duq(proxy) else tensor_quant.scaling_impl)


def _is_duq(proxy: Any) -> bool:
    return isinstance(brevitas.activation_tensor_quant(proxy), DuQTensorQuant)


def _observer(width: int, thresholds: list[Tensor], rule: ActivationRange) -> Callable[[Any, Any], None]:
    def observe(proxy: Any, inputs: Any) -> None:
        values = brevitas.unquantized(proxy, inputs[0]).detach()
        if not values.isfinite().all():
            raise DataError(
                f"an input of shape {tuple(values.shape)} to an activation quantizer holds NaN or infinity on the calibration "
                "batches. Check the batches and the model's outputs on them."
            )
        thresholds.append(_threshold(proxy, values, width, rule))

    return observe


def _threshold(proxy: Any, values: Tensor, width: int, rule: ActivationRange) -> Tensor:
    signed = brevitas.activation_format(proxy)[1]
    if _is_duq(proxy):
        return duq_range(values, signed=brevitas.activation_tensor_quant(proxy).duq.signed)
    if rule == "max":
        return values.abs().max()
    if rule == "mse":
        return mse_range(values, (width,), signed=signed)[width] * (2 ** (width - 1) if signed else 2**width - 1)
    rank = max(1, math.floor(_PERCENTILE * values.numel() + 0.5))
    return values.abs().flatten().kthvalue(rank).values
