"""Activation ranges fitted to the inputs that quantizers see, in one pass over calibration batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.quiet import quiet
from mpq_plugins.adapter.ptq import ActivationRange
from mpq_plugins.errors import DataError
from mpq_plugins.model.run import call, evaluating
from mpq_plugins.quantizers.histogram import Histogram, best_threshold

Range = tuple[Tensor, Tensor]  # the lowest and the highest value, one each or one per channel
_OUTLIERS = 1e-4  # the share that NNCF's quantile estimator leaves out at either end
# Ranges of single channels fit the calibration images: on EfficientNet-Lite0 they lost at 8 bits, where there are codes to
# spare, what they gained at 4.
_ONE_FOR_ALL = 7
_N_ROUNDS = 3


def measured(module: nn.Module, widths: Mapping[str, int], inputs: Iterable[Any]) -> dict[str, Histogram]:
    """Histograms of what reaches activation quantizers as the module stands now, for ranges of these `widths` in bits.

    `inputs` are forward arguments in any form that `call` takes. Raises `DataError` for a quantizer that saw no finite values.
    """
    inputs = list(inputs)
    histograms = {hook: histogram_of(module, hook, bits, len(inputs)) for hook, bits in widths.items()}
    measure(module, histograms, inputs)
    check_usable(histograms)
    return histograms


def histogram_of(module: nn.Module, hook: str, bits: int, n_batches: int) -> Histogram:
    """An empty histogram for a quantizer: a row for each channel that it can tell apart, or one for all."""
    quantizer = nncf_quantizers.quantizer_at(module, hook)
    return Histogram(1 if bits >= _ONE_FOR_ALL else nncf_quantizers.channels_of(quantizer), n_batches)


def measure(module: nn.Module, histograms: Mapping[str, Histogram], inputs: Iterable[Any]) -> None:
    """Count what reaches activation quantizers on `inputs`, as the module stands now."""
    with contextlib.ExitStack() as stack:
        for hook, histogram in histograms.items():
            quantizer = nncf_quantizers.quantizer_at(module, hook)
            handle = quantizer.register_forward_pre_hook(_feeding(histogram))
            stack.callback(handle.remove)
        stack.enter_context(quiet())
        stack.enter_context(evaluating(module))
        for item in inputs:
            call(module, item)


def check_usable(histograms: Mapping[str, Histogram]) -> None:
    """Raise `DataError` for a quantizer that saw no finite values."""
    for hook, histogram in histograms.items():
        if not histogram.usable:
            raise DataError(
                f"no activation range for {hook}: its input is empty or holds NaN or infinity on the calibration batches. "
                "Check the batches and the model's outputs on them."
            )


def _feeding(histogram: Histogram) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def feed(_quantizer: nn.Module, arguments: tuple[Any, ...]) -> None:
        with torch._C.DisableTorchFunction():  # NNCF watches all functions, and many small ones take long then
            histogram.add(arguments[0].detach())

    return feed


def fit(module: nn.Module, histograms: Mapping[str, Histogram], *, method: ActivationRange) -> None:
    """Give each quantizer the range that `method` finds for its width on its histogram, in place."""
    for hook, histogram in histograms.items():
        quantizer = nncf_quantizers.quantizer_at(module, hook)
        kind = nncf_quantizers.activation_kind(quantizer)
        nncf_quantizers.set_activation_range(quantizer, *_range(histogram, kind, method))


def _range(histogram: Histogram, kind: nncf_quantizers.ActivationKind, method: ActivationRange) -> Range:
    if method == "max":
        return _covering(histogram.least, histogram.most, kind)
    if method == "percentile":
        return _covering(histogram.quantile(_OUTLIERS), histogram.quantile(1 - _OUTLIERS), kind)
    return _of_least_error(histogram, kind)


def _covering(low: Tensor, high: Tensor, kind: nncf_quantizers.ActivationKind) -> Range:
    """The range of a quantizer of this kind that reaches from `low` to `high`; one around 0 where both are 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if kind.asymmetric:
        return low, torch.where(high > low, high, torch.ones_like(high))
    threshold = torch.maximum(high, -low) if kind.signed else high
    return _symmetric(torch.where(threshold > 0, threshold, torch.ones_like(threshold)), kind)


def _symmetric(threshold: Tensor, kind: nncf_quantizers.ActivationKind) -> Range:
    return threshold * (kind.lowest / kind.highest), threshold


def _of_least_error(histogram: Histogram, kind: nncf_quantizers.ActivationKind) -> Range:
    low, high = _covering(histogram.least, histogram.most, kind)

    def error(lows: Tensor, highs: Tensor) -> Tensor:
        return histogram.squared_error(lows, highs, kind.n_levels)

    if not kind.asymmetric:
        return _symmetric(best_threshold(high, lambda tried: error(*_symmetric(tried, kind))), kind)
    least, most = low, high
    for _ in range(_N_ROUNDS):
        high = torch.where(
            most > 0, best_threshold(most, lambda tried, low=low: error(low[:, None].expand_as(tried), tried)), high
        )
        low = torch.where(
            least < 0, -best_threshold(-least, lambda tried, high=high: error(-tried, high[:, None].expand_as(tried))), low
        )
    return low, high


@contextlib.contextmanager
def unquantized(module: nn.Module, places: Iterable[str] | None = None) -> Iterator[None]:
    """The quantizers at `places`, or all, let everything through meanwhile."""
    names = [hook.name for hook in nncf_quantizers.hooks(module)] if places is None else places
    quantizers = [nncf_quantizers.quantizer_at(module, name) for name in names]
    passing = [nncf_quantizers.passes_through(quantizer) for quantizer in quantizers]
    try:
        for quantizer in quantizers:
            nncf_quantizers.pass_through(quantizer, on=True)
        yield
    finally:
        for quantizer, before in zip(quantizers, passing, strict=True):
            nncf_quantizers.pass_through(quantizer, on=before)
