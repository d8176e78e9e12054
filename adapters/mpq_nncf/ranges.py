"""Ranges: of weights one by one, of activations from the inputs that quantizers see, in one pass over the batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mpq_nncf import nncf_quantizers
from mpq_nncf.internals import quiet
from mpq_nncf.wiring import LayerWiring, Wiring
from mpq_plugins.adapter.hooks import PreHook, run_hooked
from mpq_plugins.adapter.ptq import PTQ, ActivationRange, WeightRange
from mpq_plugins.adapter.repairs import Images
from mpq_plugins.errors import DataError
from mpq_plugins.quantizers.batch_norm import AbstractSite, Recorded, recorded
from mpq_plugins.quantizers.histogram import Histogram, best_threshold, least_error_threshold
from mpq_plugins.quantizers.uniform import mse_scale

Range = tuple[Tensor, Tensor]  # the lowest and the highest value, one each or one per channel
_OUTLIERS = 1e-4  # the share that NNCF's quantile estimator leaves out at either end
# Ranges of single channels fit the calibration images: on EfficientNet-Lite0 they lost at 8 bits, where there are codes to
# spare, what they gained at 4.
_ONE_FOR_ALL = 7
_N_ROUNDS = 3
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
        bits = nncf_quantizers.bits_of(quantizer)
        if method == "mse" and bits <= _WIDEST_SEARCHED:
            with torch.no_grad(), _one_thread():
                limit = mse_scale(weight, bits, channel_axis=layer.channel_axis) * quantizer.level_high
        else:
            limit = _largest(weight, layer)
        nncf_quantizers.set_weight_limit(quantizer, limit)


def _largest(weight: Tensor, layer: LayerWiring) -> Tensor:
    others = [axis for axis in range(weight.dim()) if axis != layer.channel_axis]
    largest = weight.abs().amax(dim=others, keepdim=True)
    return torch.where(largest > 0, largest, torch.ones_like(largest))


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
    hooks = [(nncf_quantizers.quantizer_at(module, hook), _feeding(histogram)) for hook, histogram in histograms.items()]
    with quiet():
        run_hooked(module, hooks, inputs)


def check_usable(histograms: Mapping[str, Histogram]) -> None:
    """Raise `DataError` for a quantizer that saw no finite values."""
    for hook, histogram in histograms.items():
        if not histogram.usable:
            raise DataError(
                f"no activation range for {hook}: its input is empty or holds NaN or infinity on the calibration batches. "
                "Check the batches and the model's outputs on them."
            )


def _feeding(histogram: Histogram) -> PreHook:
    def feed(_quantizer: nn.Module, arguments: tuple[Any, ...], _keywords: dict[str, Any]) -> None:
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
        return _symmetric(least_error_threshold(histogram, high, (kind.lowest, kind.highest), kind.highest), kind)
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


def first_places(module: nn.Module, hooks: Iterable[str]) -> list[str]:
    """One of `hooks` for each quantizer: those of joined inputs stand in several places."""
    places: dict[int, str] = {}
    for hook in hooks:
        places.setdefault(id(nncf_quantizers.quantizer_at(module, hook)), hook)
    return list(places.values())


def fit_activation_ranges(
    module: nn.Module, wiring: Wiring, images: Images, ptq: PTQ, sites: Mapping[str, AbstractSite]
) -> Recorded:
    """Fit all activation ranges of a fresh module to `images`, in place.

    Gives the moments at `sites` of used images: in this pass the module computes what the float network does.
    """
    # What batch normalisation hands on is right only while nothing before it is quantized, until it is corrected.
    places = first_places(module, [hook for layer in wiring.values() for hook in layer.activation])
    with unquantized(module):
        widths = {place: nncf_quantizers.bits_of(nncf_quantizers.quantizer_at(module, place)) for place in places}
        n_batches = len(images.quick_used) + len(images.quick_held)
        histograms = {place: histogram_of(module, place, width, n_batches) for place, width in widths.items()}
        with recorded(module, sites) as expected:
            measure(module, histograms, [batch.inputs for batch in images.quick_used])
        measure(module, histograms, [batch.inputs for batch in images.quick_held])
    check_usable(histograms)
    fit(module, histograms, method=ptq.activation_range)
    return expected
