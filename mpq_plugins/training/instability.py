"""AIWQ: how much the output of each layer jumps when its quantized weight moves by one training step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_plugins.common.files import check_keys
from mpq_plugins.errors import FormatError
from mpq_plugins.model.watch import AbstractWatch, input_argument, weight_argument
from mpq_plugins.proxies.measuring.correction import output_axis
from mpq_plugins.proxies.measuring.perturbation import Perturbation, run_changed
from mpq_plugins.training.weights import origins, plain, weights_of

_MOMENTUM = 0.999
_LARGEST = 1.0  # Steps that change a layer's output by more than this are skipped.
_COLUMNS = ("running", "steps", "skipped")


def output_shift(new: Tensor, old: Tensor, channel_axis: int) -> Tensor:
    """KL divergence between a layer's outputs before and after a step, mean over its output channels, as float64.

    KL_c = ln(sigma_old / sigma_new) + (sigma_new^2 + (mu_new - mu_old)^2) / (2 sigma_old^2) - 1/2, with mean and
    (population) deviation over batch and space: activation instability induced by weight quantization, AIWQ (PROFIT,
    Park and Yoo 2020, section 3). Channels that are constant or not finite in either output are left out; NaN if all are.
    """
    axis = channel_axis % new.dim()
    others = [index for index in range(new.dim()) if index != axis]
    (variance_new, mean_new), (variance_old, mean_old) = (_moments(y, others) for y in (new, old))
    # Consecutive steps differ little: taken apart into small terms, the divergence keeps its digits.
    growth = (variance_new - variance_old) / variance_old
    divergence = (growth - torch.log1p(growth) + (mean_new - mean_old).square() / variance_old) / 2
    counts = (variance_new > 0) & (variance_old > 0) & divergence.isfinite()
    return torch.where(counts, divergence, 0).sum() / counts.sum()


def _moments(values: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float()
    variance, mean = torch.var_mean(values, dim=axes, correction=0)
    return variance.double(), mean.double()


@final
class Instability:
    """Measures AIWQ per layer during ordinary training, on any module that keeps its layers' names and weights.

    Wrap the forward passes of training in `with instability.watching():` and call `on_step()` once per optimizer step;
    the first forward pass after each step is compared with what the layers would have given, on the same input, with the
    quantized weights of the step before (one more convolution per layer, without gradients; a copy of the weights is kept).
    The weight is the one that the layer really computed with, its call repeated as it was made, padding included.

    Per layer a running average 0.999 / 0.001 is kept; steps beyond 1 are skipped, as published, and so are steps without
    any usable channel, so that no NaN enters. Layers with one weight are one: the first of their names stands for it.
    """

    def __init__(self, module: nn.Module, layers: Iterable[str]) -> None:
        self._row_of: dict[int, int] = {}  # by id of the weight's parameters
        self._parameters = weights_of(module, layers)  # keeps the ids unique
        names = []
        for name, parameters in self._parameters.items():
            if all(id(parameter) not in self._row_of for parameter in parameters):
                names.append(name)
            for parameter in parameters:
                self._row_of.setdefault(id(parameter), len(names) - 1)
        self.layers = tuple(names)
        self._table = torch.zeros(len(names), len(_COLUMNS), dtype=torch.float64)  # [layer, column]
        self._latest: dict[int, Tensor] = {}
        self._before: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch one forward pass of training; it must run with gradients on."""
        with _WeightedCalls(self._on_call):
            yield
        self._before.clear()

    def on_step(self) -> None:
        """Say that the optimizer moves the weights now, so that the next forward pass is compared with the last."""
        self._before, self._latest = self._latest, {}

    def forget_weights(self) -> None:
        """Start anew with the next forward pass: the weights were changed by more than a step, or a checkpoint was taken."""
        self._before, self._latest = {}, {}

    def _on_call(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        weight = plain(weight_argument(args, kwargs))
        row = None if weight is None else next((self._row_of[id(o)] for o in origins(weight) if id(o) in self._row_of), None)
        if weight is None or row is None:
            return
        before = self._before.get(row)
        if before is not None:
            with torch.no_grad():
                # The call repeated, with the weight of the step before.
                read = (plain(input_argument(args, kwargs)), *args[1:])
                old = run_changed(function, read, kwargs, [Perturbation(before)])
                self._record(row, output_shift(output.detach(), old, output_axis(function)))
        self._latest.setdefault(row, weight.detach().clone())

    def _record(self, row: int, shift: Tensor) -> None:
        # No value is read here: that would make a GPU wait at every layer.
        if self._table.device != shift.device:
            self._table = self._table.to(shift.device)
        running, steps, skipped = self._table[row]
        taken = shift <= _LARGEST  # false for NaN
        average = _MOMENTUM * running + (1 - _MOMENTUM) * shift
        self._table[row] = torch.stack([torch.where(taken, average, running), steps + taken, skipped + (shift > _LARGEST)])

    @property
    def n_measured(self) -> int:
        """Steps measured, skipped ones included, of the layer that has most."""
        return int(self._table[:, 1:].sum(dim=1).max()) if self.layers else 0

    @property
    def values(self) -> dict[str, float]:
        """Layer name -> AIWQ.

        The running average over its sum of weights 1 - 0.999^n, without which it would still grow over thousands of
        steps. A layer all of whose steps were skipped has 1, the least they had; one without any usable step has 0.
        """
        return {name: _value(*row) for name, row in zip(self.layers, self._table.tolist(), strict=True)}

    @property
    def order(self) -> tuple[str, ...]:
        """Layer names, the most unstable first; ties in the order of the layers."""
        values = self.values
        return tuple(sorted(values, key=lambda name: -values[name]))

    def average(self, mean: Callable[[Tensor], Tensor]) -> None:
        """Agree with other processes: `mean` gives the mean of a tensor over all of them."""
        self._table = mean(self._table)

    def to_json(self) -> dict[str, dict[str, float]]:
        """What was measured, as plain JSON values; exact."""
        return {
            name: dict(zip(_COLUMNS, row, strict=True)) for name, row in zip(self.layers, self._table.tolist(), strict=True)
        }

    def restore(self, document: Mapping[str, Mapping[str, float]]) -> None:
        """Take back what `to_json` gave; raises `FormatError` for other layers."""
        where = "the measured instability"
        check_keys(dict(document), allowed=set(self.layers), required=set(self.layers), where=where)
        for name in self.layers:
            if set(document[name]) != set(_COLUMNS):
                raise FormatError(f"{where} of {name} must hold {', '.join(_COLUMNS)}, not {', '.join(document[name])}.")
        rows = [[document[name][column] for column in _COLUMNS] for name in self.layers]
        self._table = torch.tensor(rows, dtype=torch.float64).reshape(self._table.shape)
        self.forget_weights()


def values_of(document: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Layer name -> AIWQ, from what `Instability.to_json` gave."""
    return {name: _value(*(columns[column] for column in _COLUMNS)) for name, columns in document.items()}


def _value(running: float, steps: float, skipped: float) -> float:
    if steps:
        return running / float(1 - _MOMENTUM**steps)
    return _LARGEST if skipped else 0.0


@final
class _WeightedCalls(AbstractWatch):
    def __init__(self, on_call: Callable[[Any, Sequence[Any], Mapping[str, Any], Tensor], None]) -> None:
        super().__init__()
        self._on_call = on_call

    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        result = plain(output)
        if result is not None:
            self._on_call(function, args, kwargs, result)
