"""Ranges: of weights one by one, of activations in one pass over the data; first by Brevitas, then fitted again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import internals as brevitas
from mpq_brevitas.duq import DuQTensorQuant
from mpq_plugins.adapter.hooks import PreHook, run_hooked
from mpq_plugins.adapter.ptq import ActivationRange
from mpq_plugins.errors import DataError
from mpq_plugins.model.run import Batch, call, tensors
from mpq_plugins.quantizers.duq import activation_range as duq_range
from mpq_plugins.quantizers.histogram import Histogram, least_error_threshold

_PERCENTILE = 0.9999900  # Brevitas' own for activations


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


def observe_inputs(model: nn.Module, histograms: Mapping[str, Histogram], batches: Sequence[Batch]) -> None:
    """Count the inputs of the layers named in `histograms` over `batches`; `model` is rooted."""

    def counting(histogram: Histogram) -> PreHook:
        def count(_module: nn.Module, args: object, keywords: object) -> None:
            for tensor in tensors((args, keywords)):
                histogram.add(tensor)

        return count

    hooks = [(model.get_submodule(name), counting(histogram)) for name, histogram in histograms.items()]
    run_hooked(model, hooks, [batch.inputs for batch in batches])


def fit_weights(module: nn.Module, names: Iterable[str]) -> None:
    """Fit the weight ranges of the named layers to the bits they have."""
    with brevitas.guarded():
        for name in names:
            brevitas.refit_weight_scale(module.get_submodule(name))


def restart_weights(module: nn.Module, names: Iterable[str]) -> None:
    """Give the named layers the weight ranges that preparing the module with the weights of now would give."""
    names = list(names)
    for name in names:
        layer = module.get_submodule(name)
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


def fit_to_inputs(module: nn.Module, inputs: Mapping[str, Histogram], rule: ActivationRange) -> None:
    """Fit the range of each named layer's own input quantizer to what the float layer was given; `rule` is "max" or "mse".

    Layers that were given nothing keep their ranges. Raises `DataError` for NaN and infinity.
    """
    thresholds = {}
    for name, histogram in inputs.items():
        if histogram.empty:
            continue
        if not histogram.usable:
            raise _not_finite(f"the input of {name}")
        proxy = module.get_submodule(name).input_quant
        thresholds[proxy] = _fitted(proxy, histogram, brevitas.activation_format(proxy)[0], rule)
    set_thresholds(thresholds)


def measured(
    module: nn.Module, widths: Mapping[Any, int], batches: Iterable[Batch], rule: ActivationRange
) -> dict[Any, Tensor]:
    """Thresholds of the activation quantizers in `widths` for these widths, from what reaches them as the module stands now.

    Quantizers that share a scale get one threshold: with `rule` "max" the largest, with "mse" the best for all their values,
    else the mean over operands and batches.
    Quantizers that nothing reaches, or all of them without batches, have none. Raises `DataError` for NaN and infinity.
    """
    batches = list(batches)
    counted = {_range_of(proxy): Histogram(1, len(batches)) for proxy in widths if rule == "mse" and not _is_duq(proxy)}
    found: dict[int, list[Tensor]] = {}
    hooks = []
    for proxy in widths:
        own = _range_of(proxy)
        hooks.append((proxy, _observer(found.setdefault(own, []), rule, counted.get(own))))
    with brevitas.guarded():
        run_hooked(module, hooks, [batch.inputs for batch in batches])
    thresholds = {proxy: _joined(proxy, found[_range_of(proxy)], rule) for proxy in widths if found[_range_of(proxy)]}
    for proxy, width in widths.items():
        histogram = counted.get(_range_of(proxy))
        if histogram is not None and histogram.usable:
            thresholds[proxy] = _fitted(proxy, histogram, width, rule)
    return thresholds


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


def _observer(thresholds: list[Tensor], rule: ActivationRange, histogram: Histogram | None) -> PreHook:
    def observe(proxy: Any, inputs: Any, _keywords: Any) -> None:
        values = brevitas.unquantized(proxy, inputs[0]).detach()
        if histogram is not None:
            histogram.add(values)
        if not (values.isfinite().all() if histogram is None else histogram.usable or histogram.empty):
            raise _not_finite(f"an input of shape {tuple(values.shape)} to an activation quantizer")
        if histogram is None:
            thresholds.append(_threshold(proxy, values, rule))

    return observe


def _not_finite(what: str) -> DataError:
    return DataError(
        f"{what} holds NaN or infinity on the calibration batches. Check the batches and the model's outputs on them."
    )


def _threshold(proxy: Any, values: Tensor, rule: ActivationRange) -> Tensor:
    if _is_duq(proxy):
        return duq_range(values, signed=brevitas.activation_tensor_quant(proxy).duq.signed)
    if rule == "max":
        return values.abs().max()
    rank = max(1, math.floor(_PERCENTILE * values.numel() + 0.5))
    return values.abs().flatten().kthvalue(rank).values


def _fitted(proxy: Any, histogram: Histogram, width: int, rule: ActivationRange) -> Tensor:
    """The threshold for codes of `width` bits, negative ones too where the quantizer is signed."""
    signed = brevitas.activation_format(proxy)[1]
    largest = torch.maximum(histogram.most, -histogram.least)
    if rule == "max":
        return largest[0]
    # A range is a number of steps: from -2^(b-1) to 2^(b-1) - 1 of them, or from 0 to 2^b - 1.
    n_steps = 2 ** (width - 1) if signed else 2**width - 1
    lowest, highest = (-n_steps, n_steps - 1) if signed else (0, n_steps)
    most = torch.where(largest > 0, largest, torch.ones_like(largest)) * (n_steps / max(highest, 1))
    return least_error_threshold(histogram, most, (lowest, highest), n_steps)[0]
