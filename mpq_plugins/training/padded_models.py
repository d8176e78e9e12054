"""Negative padding for whole models: every hard swish that only convolutions and linear layers read, shifted to start at 0."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_plugins.model.run import call, evaluating, tensors
from mpq_plugins.model.watch import METADATA_NAMES, AbstractWatch, function_name, input_argument, weight_argument
from mpq_plugins.training.negative_padding import HARDSWISH_OFFSET, folded_offset

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# These hand on the mean or the values of their input as they are, so that a shift before them is a shift behind them.
_SHIFT_PASSES = frozenset(
    "flatten reshape view permute transpose squeeze unsqueeze contiguous adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d mean dropout max_pool2d adaptive_max_pool2d".split()
)


@final
class ShiftedHardswish(nn.Hardswish):
    """hardswish(x) + 3/8, which is never negative."""

    def forward(self, input: Tensor) -> Tensor:
        """`input` of any shape, to the same shape."""
        shifted: Tensor = super().forward(input) + HARDSWISH_OFFSET
        return shifted


@final
@dataclass(frozen=True)
class NegativelyPadded:
    """A rewritten copy of a model: the names of the hard swishes that it shifts, and why others stayed."""

    model: nn.Module
    rewritten: tuple[str, ...]
    kept: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Swish:
    """A hard swish module, and what reads its output."""

    n_calls: int = 0
    readers: list[nn.Module] = field(default_factory=list)
    other: str | None = None  # a reader that cannot take the shift up


@final
class _ReaderWatch(AbstractWatch):
    """Notes what reads the output of every hard swish, through operations that hand a shift on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.swishes = {name: _Swish() for name, module in model.named_modules() if type(module) is nn.Hardswish}
        self.norm_of: dict[nn.Module, nn.Module] = {}  # layer -> the batch normalisation that reads its output
        self.n_reads: Counter[nn.Module] = Counter()
        self.n_calls: Counter[nn.Module] = Counter()
        self.n_norm_calls: Counter[nn.Module] = Counter()
        self._open: dict[int, tuple[Tensor, str]] = {}  # by id of the tensor
        self._produced: dict[int, tuple[Tensor, nn.Module]] = {}
        # A parametrized weight is computed anew at every call: it is no parameter of its layer.
        layers = [layer for layer in model.modules() if isinstance(layer, _FOLDABLE) and "weight" in layer._parameters]
        self._owner = {id(layer.weight): layer for layer in layers}
        self._norms = {id(norm.running_mean): norm for norm in model.modules() if isinstance(norm, _NORMS)}
        self._inside = 0

    def enter(self, _module: nn.Module, args: Any, keywords: Any) -> None:
        self._inside += 1
        self.close((args, keywords), "Hardswish")

    def leave(self, name: str, output: Tensor) -> None:
        self._inside -= 1
        self.swishes[name].n_calls += 1
        self._open[id(output)] = (output, name)

    def before_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        layer = self._owner.get(id(weight_argument(args, kwargs)))
        if layer is not None:
            self.n_calls[layer] += 1
        held = self._open.get(id(input_argument(args, kwargs)))
        if held is None:
            return
        if layer is None:
            self.swishes[held[1]].other = f"{function_name(function)} with a weight of no foldable layer"
        else:
            self.swishes[held[1]].readers.append(layer)

    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        layer = self._owner.get(id(weight_argument(args, kwargs)))
        if layer is not None:
            self._produced[id(output)] = (output, layer)

    def before_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = function_name(function)
        if not self._inside and name not in METADATA_NAMES and name not in _SHIFT_PASSES:
            self.close((args, kwargs), name)

    def on_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        name = function_name(function)
        if name == "__get__" and isinstance(output, Tensor):  # x.T, x.data
            self.close(args, "an attribute of its output")
        if name in METADATA_NAMES:
            return
        source = input_argument(args, kwargs)
        if name in _SHIFT_PASSES and id(source) in self._open:
            if isinstance(output, Tensor):
                self._open[id(output)] = (output, self._open[id(source)][1])
            else:
                self.close(source, name)
        mean = args[1] if len(args) > 1 else kwargs.get("running_mean")
        norm = None if name != "batch_norm" or mean is None else self._norms.get(id(mean))
        if norm is not None:
            self.n_norm_calls[norm] += 1
        for layer in (self._produced[id(read)][1] for read in tensors((args, kwargs)) if id(read) in self._produced):
            self.n_reads[layer] += 1
            if norm is not None:
                self.norm_of[layer] = norm

    def close(self, read: Any, reader: str) -> None:
        """Note that the tensors in `read` are read by something that cannot take a shift up."""
        for tensor in tensors(read):
            if id(tensor) in self._open:
                self.swishes[self._open[id(tensor)][1]].other = reader


def with_negative_padding(model: nn.Module, example: Any) -> NegativelyPadded:
    """A copy of `model` whose hard swishes start at 0 where only convolutions and linear layers read them.

    Such a hard swish gives hardswish(x) + 3/8, which calibration finds to be unsigned, and its readers get the constant
    3/8 sum(W) taken out again: from their bias, or else from the running mean of the batch normalisation that alone reads
    them, or else by a new bias. The function stays, except that convolutions padded with 0 now pad the hard swish with
    its minimum -3/8 (negative padding, PROFIT, Park and Yoo 2020, section 4): fine-tune, or re-estimate the batch
    normalisation, where that matters. Dropout in between drops to the minimum too, in training. Layer names and weights
    stay, and so does the fingerprint. Found are modules of class `nn.Hardswish` that one forward pass of `example` calls once.
    """
    padded = copy.deepcopy(model)
    watch = _watched(padded, example)
    reasons = {name: _reason(swish, watch) for name, swish in watch.swishes.items()}
    kept = {name: reason for name, reason in reasons.items() if reason is not None}
    rewritten = tuple(name for name, reason in reasons.items() if reason is None)
    for name in rewritten:
        _replace(padded, name)
        for layer in watch.swishes[name].readers:
            _take_up(layer, watch)
    return NegativelyPadded(padded, rewritten, kept)


def _watched(model: nn.Module, example: Any) -> _ReaderWatch:
    watch = _ReaderWatch(model)
    handles = []
    for name in watch.swishes:
        swish = model.get_submodule(name)
        handles.append(swish.register_forward_pre_hook(watch.enter, with_kwargs=True))
        handles.append(swish.register_forward_hook(lambda _module, _inputs, output, name=name: watch.leave(name, output)))
    try:
        with evaluating(model), watch:
            result = call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    watch.close(result, "the user of the model's output")  # who expects no shift
    return watch


def _reason(swish: _Swish, watch: _ReaderWatch) -> str | None:
    """Why a hard swish stays as it is, or None."""
    if swish.n_calls != 1:
        return f"called {swish.n_calls} times on this example"
    if swish.other is not None:
        return f"read by {swish.other}"
    if not swish.readers:
        return "read by no layer"
    if any(watch.n_calls[layer] != 1 for layer in swish.readers):
        return "a layer that reads it is called several times"
    return None


def _replace(model: nn.Module, name: str) -> None:
    """Shift the hard swish `name` wherever it is registered."""
    old = model.get_submodule(name)
    assert isinstance(old, nn.Hardswish)
    new = ShiftedHardswish(inplace=old.inplace).train(old.training)
    for place in [place for place, module in model.named_modules(remove_duplicate=False) if module is old]:
        parent, _, attribute = place.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)


@torch.no_grad()
def _take_up(layer: nn.Module, watch: _ReaderWatch) -> None:
    """Remove from the output of `layer`, in place, what the shift of its input adds to it."""
    assert isinstance(layer.weight, Tensor)
    constant = folded_offset(layer.weight)
    norm = watch.norm_of.get(layer) if watch.n_reads[layer] == 1 else None
    if isinstance(layer.bias, Tensor):
        layer.bias += constant
    # Statistics of a norm that is called several times serve other layers too.
    elif norm is not None and watch.n_norm_calls[norm] == 1 and isinstance(norm.running_mean, Tensor):
        norm.running_mean -= constant
    else:
        layer.bias = nn.Parameter(constant)
