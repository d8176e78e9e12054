"""The correction that follows quantization, on the activations of a run: statistics of norms and biases of layers are moved.

A prepared network has the statistics of its batch normalisations moved by what quantization did to them on the calibration
images, in the order of the forward pass, and the biases of the other layers likewise. Both are one affine map per channel,
so a run can have the same without touching a module: with the output o of a norm of bias b, trained variance v and
sigma(v) = sqrt(v + eps),

    o <- (o - b - (mean(o) - mean_float)) sigma(v) / sigma(v ratio) + b,     ratio = variance(o) / variance_float in 0.1 .. 10

and with the output o of a layer that has a bias, no norm and no axis of tokens, o <- o - (mean(o) - mean_float).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq_plugins.model.watch import WEIGHTED, bias_argument, function_name, input_argument
from mpq_plugins.proxies.measuring.perturbation import AbstractCalls
from mpq_plugins.quantizers.batch_norm import is_of_tokens

# Of a run. The fewer images, the more of what quantization did to them the correction takes back, and not alike in all layers:
# on EfficientNet-Lite0 single losses of 8, 16 and 48 images are as 1 to 2 to 3, those of the classifier as 1 to 1.1 to 1.2.
LEAST_IMAGES = 32
_RATIOS = (0.1, 10.0)
_CONSTANT = 1e-10  # of the trained variance: a channel that varies less on these images says nothing about its ratio
_DEAD = 1e-6  # of the float variance: quantization left the channel constant but for rounding, so there is no ratio


def output_axis(function: Any) -> int:
    """The axis of the channels in the output of a weighted function, from the end."""
    kind, _ = WEIGHTED[function]
    return -1 if kind == "Linear" else -1 - int(kind[-2])  # Conv2d has two axes behind the channels


@final
@dataclass(frozen=True)
class Norm:
    """A batch normalisation in evaluation mode, as scale and shift per channel: y = x factor + shift."""

    factor: Tensor  # [channel]
    shift: Tensor  # [channel]
    mean: Tensor  # [channel], trained
    variance: Tensor  # [channel], trained
    bias: Tensor  # [channel]
    eps: float

    @classmethod
    def of(cls, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Norm, tuple[Tensor, ...]] | None:
        """The normalisation that a call computes and the tensors that define it; None for other calls and for training."""
        if function_name(function) != "batch_norm" or function is not F.batch_norm:
            return None
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        mean, variance, weight, bias = (given.get(name) for name in names[1:5])
        if given.get("training") or mean is None or variance is None:
            return None
        eps = given.get("eps", 1e-5)
        factor = (torch.rsqrt(variance + eps) * (1.0 if weight is None else weight)).detach()
        start = (torch.zeros_like(mean) if bias is None else bias).detach()
        constants = tuple(tensor for tensor in (mean, variance, weight, bias) if tensor is not None)
        return cls(factor, start - mean * factor, mean.detach(), variance.detach(), start, eps), constants


@final
@dataclass(frozen=True)
class Site:
    """A value that is corrected: its channel axis, and the norm that gave it (None for a layer with a bias)."""

    axis: int
    norm: Norm | None = None


@final
class Corrector:
    """Corrects the values at a site by what the float network has there on the same images."""

    def __init__(self, of_float: Tensor, site: Site) -> None:
        self._site = site
        self._is_idle = site.norm is None and is_of_tokens(of_float, site.axis)
        # The mean but for rounding: squares around it are accurate.
        self._origin = _means(of_float, site.axis)
        self._offset, variance = self._around(of_float)
        if site.norm is not None and variance is not None:
            self._keep(site.norm, variance)

    def __call__(self, values: Tensor, n_variants: int = 1) -> Tensor:
        """`values` corrected in place; variants stand one after the other along the first axis, with statistics each."""
        if self._is_idle:
            return values
        for part in values.chunk(n_variants) if n_variants > 1 else (values,):
            scale, shift = self._affine(part)
            if scale is not None:
                part.mul_(scale)
            part.add_(shift)
        return values

    def apart(self, values: Tensor) -> Tensor:
        """The same as a new tensor, the statistics taken as constants by gradients."""
        if self._is_idle:
            return values
        scale, shift = self._affine(values.detach())
        return values + shift if scale is None else values * scale + shift

    def _keep(self, norm: Norm, variance: Tensor) -> None:
        """What of sigma(v) / sigma(v ratio) does not depend on the values that are corrected, in the units of these."""
        own = norm.variance.to(variance.dtype)
        constant = variance <= _CONSTANT * norm.factor.square() * own
        self._least, self._most = (torch.where(constant, 1.0, ratio) * own + norm.eps for ratio in _RATIOS)
        self._gain = torch.where(constant, 0.0, own / variance)
        self._dead = _DEAD * variance
        # A constant channel has its own variance: the gain is zero, so both bounds hold it.
        self._eps = torch.full_like(self._gain, norm.eps)
        self._bias = norm.bias.to(variance.dtype)
        # Of the float network itself by the same steps, so that equal values are left as they are to the last bit.
        self._of_float = self._square_of_sigma(variance)

    def _square_of_sigma(self, variance: Tensor) -> Tensor:
        return torch.addcmul(self._eps, variance, self._gain).clamp_(self._least, self._most)

    def _affine(self, values: Tensor) -> tuple[Tensor | None, Tensor]:
        """Scale (None for one) and shift, shaped to broadcast with `values`."""
        offset, variance = self._around(values)
        moved = offset.sub_(self._offset)
        if variance is None:
            return None, _spread(moved.neg_(), values, self._site.axis)
        scale = (self._of_float / self._square_of_sigma(variance)).sqrt_().masked_fill_(variance <= self._dead, 1.0)
        shift = torch.addcmul(self._bias, moved.add_(self._bias), scale, value=-1)
        return _spread(scale, values, self._site.axis), _spread(shift, values, self._site.axis)

    def _around(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean less the origin, and at a norm the biased variance. Several times faster than `torch.var_mean`."""
        axis, origin = self._site.axis, self._origin
        if self._site.norm is None:
            return _means(values, axis).sub_(origin), None
        rows = _rows(values, axis)
        if rows is not None:
            mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
            return mean.sub_(origin), variance
        around = values - _spread(origin, values, axis)
        offset = _means(around, axis)
        variance = _means(around.square_(), axis)
        return offset, variance.addcmul_(offset, offset, value=-1).clamp_min_(0.0)


@final
class ChangeOfOutput:
    """Corrects the change of one layer's output: by its own bias, or ahead of the norm that alone reads its `output`."""

    def __init__(self, axis: int, norm: Norm | None = None, output: Tensor | None = None) -> None:
        self._axis, self._output = axis, output
        if norm is not None and output is not None:
            # The norm gives on the corrected input what the corrected norm gives: the same map, of the values before it.
            before = replace(norm, factor=torch.ones_like(norm.factor), bias=norm.mean)
            self._corrector = Corrector(output, Site(axis, before))

    def __call__(self, change: Tensor) -> Tensor:
        """The change that is left after the correction. The argument is written over."""
        if self._output is None:
            if is_of_tokens(change, self._axis):
                return change
            mean = _means(change, self._axis)
            return change.sub_(_spread(mean, change, self._axis))
        return self._corrector(change.add_(self._output)).sub_(self._output)


def _rows(values: Tensor, axis: int) -> Tensor | None:
    """`values` as [row, channel] where its memory lies like that, else None."""
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
        return None
    if values.stride(axis) != 1:  # told sooner than by moving it
        return None
    last = values.movedim(axis, -1)
    return last.reshape(-1, last.shape[-1]) if last.is_contiguous() else None


def _means(values: Tensor, axis: int) -> Tensor:  # [channel], float32 at least
    dtype = torch.promote_types(values.dtype, torch.float32)
    others = [other for other in range(values.dim()) if other != axis % values.dim()]
    if not others:
        return values.to(dtype, copy=True)
    # A sum and a product run several times faster on CPUs than `mean`, and a quotient copies its number first.
    return values.sum(others, dtype=dtype).mul_(values.shape[axis] / max(1, values.numel()))


def _spread(per_channel: Tensor, like: Tensor, axis: int) -> Tensor:
    """A row of channels shaped to broadcast with `like`."""
    return per_channel.reshape(-1, *[1] * (like.dim() - 1 - axis % like.dim()))


@final
class Occurrences:
    """Tells the sites of whole forward passes: by the bias or the running mean that is read, and how often it was before."""

    def __init__(self, leaves: frozenset[int]) -> None:
        self._leaves = leaves  # ids of the model's own tensors: those of others may be given anew
        self._seen: Counter[int] = Counter()

    def site(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[int, int], Site] | None:
        """The key and the site of a call's value; None where nothing is corrected."""
        if function in WEIGHTED:
            bias = bias_argument(args, kwargs)
            return None if bias is None else self._numbered((bias,), Site(output_axis(function)))
        norm = Norm.of(function, args, kwargs)
        return None if norm is None else self._numbered(norm[1], Site(1, norm[0]))

    def _numbered(self, constants: Sequence[Tensor], site: Site) -> tuple[tuple[int, int], Site] | None:
        if any(id(tensor) not in self._leaves for tensor in constants):
            return None
        key = id(constants[0])
        self._seen[key] += 1
        return (key, self._seen[key]), site


@final
class Reference(AbstractCalls):
    """What corrects whole forward passes over the images of a run: the float network at every site of a pass in its context."""

    def __init__(self, leaves: frozenset[int]) -> None:
        super().__init__()
        self.leaves = leaves
        self.correctors: dict[tuple[int, int], Corrector] = {}
        self._sites = Occurrences(leaves)
        self._layers: dict[int, tuple[weakref.ref[Tensor], tuple[int, int]]] = {}  # by id of a biased layer's output

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Take up the value of a call of the float pass."""
        site = self._sites.site(func, args, kwargs)
        read = input_argument(args, kwargs)
        held = self._layers.get(id(read))
        if held is not None and held[0]() is read and site is not None and site[1].norm is not None:
            self.correctors.pop(held[1], None)  # a layer that a norm reads is corrected there
        values = func(*args, **kwargs)
        self._layers.pop(id(values), None)  # Changed in place or passed on: it is not the layer's output any more.
        if site is not None:
            key, where = site
            if where.norm is None:
                self._layers[id(values)] = (weakref.ref(values), key)
            self.correctors[key] = Corrector(values, where)
        return values


def correcting(reference: Reference | None, *, apart: bool = False) -> Callable[..., Any]:
    """What corrects (function, args, kwargs, value) of every call of one pass, in place where the float pass had the value.

    With `apart` it gives new tensors, the statistics taken as constants by gradients.
    """
    sites = None if reference is None else Occurrences(reference.leaves)

    def corrected(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], value: Any) -> Any:
        site = None if sites is None else sites.site(function, args, kwargs)
        corrector = None if site is None or reference is None else reference.correctors.get(site[0])
        return value if corrector is None else corrector.apart(value) if apart else corrector(value)

    return corrected
