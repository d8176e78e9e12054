"""The correction that follows quantization, on the activations of a run: statistics of norms and biases of layers are moved.

A prepared network has the statistics of its batch normalisations moved by what quantization did to them on the calibration
images, in the order of the forward pass, and the biases of the other layers likewise. Both are one affine map per channel,
so a run can have the same without touching a module: with the output o of a norm of bias b, trained variance v and
sigma(v) = sqrt(v + eps),

    o <- (o - b - (mean(o) - mean_float)) sigma(v) / sigma(v ratio) + b,     ratio = variance(o) / variance_float in 0.1 .. 10

and with the output o of a layer that has a bias and no norm, o <- o - (mean(o) - mean_float).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq_plugins._flow import WEIGHTED, bias_argument, function_name

LEAST_IMAGES = 8  # of a run: with fewer, the images that are measured decide too much of their own correction
_RATIOS = (0.1, 10.0)
_CONSTANT = 1e-10  # of the trained variance: a channel that varies less on these images says nothing about its ratio
_AXIS = {
    torch.conv1d: -2,
    torch.conv2d: -3,
    torch.conv3d: -4,
    torch.conv_transpose1d: -2,
    torch.conv_transpose2d: -3,
    torch.conv_transpose3d: -4,
    F.linear: -1,
}


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

    @classmethod
    def of_layer(cls, function: Any) -> Site:
        """The output of a weighted function with a bias."""
        return cls(_AXIS[function])

    @classmethod
    def of_norm(cls, norm: Norm) -> Site:
        """The output of a norm."""
        return cls(1, norm)


@final
@dataclass(frozen=True)
class Moments:
    """What the float network has at a site: mean = `origin` + `offset`, and variance where there is a norm."""

    origin: Tensor  # [channel], near the mean, so that squares around it are accurate
    offset: Tensor  # [channel]
    variance: Tensor | None  # [channel]

    @classmethod
    def of(cls, values: Tensor, site: Site) -> Moments:
        """Of the values at a site."""
        origin = _sums(values, site.axis) / _n_values(values, site.axis)
        return cls(origin, *_around(values, site.axis, origin, with_variance=site.norm is not None))


def correct(values: Tensor, site: Site, of_float: Moments, n_variants: int = 1) -> Tensor:
    """Correct values in place; variants stand one after the other along the first axis, each with its own statistics."""
    for part in values.chunk(n_variants) if n_variants > 1 else (values,):
        scale, shift = affine(part, site, of_float)
        if scale is None:
            part.add_(_spread(shift, part, site.axis))
        else:
            _mapped_(part, site.axis, scale, shift)
    return values


def corrected(values: Tensor, site: Site, of_float: Moments) -> Tensor:
    """The same as a new tensor, the statistics taken as constants by gradients."""
    scale, shift = affine(values.detach(), site, of_float)
    shifted = values if scale is None else values * _spread(scale, values, site.axis)
    return shifted + _spread(shift, values, site.axis)


def affine(values: Tensor, site: Site, of_float: Moments) -> tuple[Tensor | None, Tensor]:
    """Scale (None for one) and shift per channel that correct the values at a site."""
    norm = site.norm
    if norm is None:
        offset, _ = _around(values, site.axis, of_float.origin, with_variance=False)
        return None, (of_float.offset - offset).to(values.dtype)
    return _affine(values, site.axis, norm, of_float, norm.bias, norm.factor.square() * norm.variance)


@final
class ChangeOfOutput:
    """Corrects the change of one layer's output, ahead of its norm or by its own bias."""

    def __init__(self, axis: int, norm: Norm | None = None, output: Tensor | None = None) -> None:
        self._axis, self._norm, self._output = axis, norm, output
        self._own = None if output is None else Moments.of(output, Site(axis, norm))

    @classmethod
    def before_norm(cls, output: Tensor, norm: Norm) -> ChangeOfOutput:
        """For a layer whose `output` only a norm reads."""
        return cls(1, norm, output)

    @classmethod
    def of_layer(cls, function: Any) -> ChangeOfOutput:
        """For a weighted function with a bias that no norm reads."""
        return cls(_AXIS[function])

    def __call__(self, change: Tensor) -> Tensor:
        """The change that is left after the correction. The argument is written over."""
        if self._norm is None or self._output is None or self._own is None:
            mean = _sums(change, self._axis) / _n_values(change, self._axis)
            return change.sub_(_spread(mean.to(change.dtype), change, self._axis))
        scale, shift = _affine(
            change.add_(self._output), self._axis, self._norm, self._own, self._norm.mean, self._norm.variance
        )
        return _mapped_(change, self._axis, scale, shift).sub_(self._output)


def _affine(values: Tensor, axis: int, norm: Norm, of_float: Moments, centre: Tensor, trained: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift per channel; `centre` and `trained` are the norm's trained mean and variance as `values` have them."""
    offset, variance = _around(values, axis, of_float.origin, with_variance=True)
    assert variance is not None  # it was asked for
    assert of_float.variance is not None  # so it was of the float network
    scale = _scale(norm, variance, of_float.variance, trained)
    shift = centre - (centre + offset - of_float.offset) * scale
    return scale.to(values.dtype), shift.to(values.dtype)


def _mapped_(values: Tensor, axis: int, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(_spread(shift, values, axis), values, _spread(scale, values, axis), out=values)


def _scale(norm: Norm, variance: Tensor, of_float: Tensor, trained: Tensor) -> Tensor:
    """sigma(v) / sigma(v ratio); `trained` is the trained variance in the units of the other two."""
    ratio = torch.where(of_float <= _CONSTANT * trained, 1.0, variance / of_float).nan_to_num(1.0).clamp(*_RATIOS)
    return ((norm.variance + norm.eps) / (norm.variance * ratio + norm.eps)).sqrt()


def _around(values: Tensor, axis: int, origin: Tensor, *, with_variance: bool) -> tuple[Tensor, Tensor | None]:
    """Mean less `origin`, and the biased variance, over all axes but one. Several times faster than `torch.var_mean`."""
    n_values = _n_values(values, axis)
    if not with_variance:
        return _sums(values, axis) / n_values - origin, None
    rows = _rows(values, axis)
    if rows is not None and rows.dtype in (torch.float32, torch.float64) and rows.device.type == "cpu":
        mean, variance = torch.batch_norm_update_stats(rows, None, None, 0.0)
        return mean - origin, variance
    around = values.to(origin.dtype) - _spread(origin, values, axis)
    offset = _sums(around, axis) / n_values
    variance = _sums(around.square_(), axis) / n_values - offset.square()
    return offset, variance.clamp_min_(0.0)


def _rows(values: Tensor, axis: int) -> Tensor | None:
    """`values` as [row, channel] where its memory lies like that, else None."""
    last = values.movedim(axis, -1)
    return last.reshape(-1, last.shape[-1]) if last.is_contiguous() else None


def _n_values(values: Tensor, axis: int) -> int:
    """Per channel, at least one."""
    return max(1, values.numel() // max(1, values.shape[axis]))


def _sums(values: Tensor, axis: int) -> Tensor:  # [channel]
    dtype = torch.promote_types(values.dtype, torch.float32)
    others = [other for other in range(values.dim()) if other != axis % values.dim()]
    return values.sum(others, dtype=dtype) if others else values.to(dtype)


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
            return None if bias is None else self._numbered((bias,), Site.of_layer(function))
        norm = Norm.of(function, args, kwargs)
        return None if norm is None else self._numbered(norm[1], Site.of_norm(norm[0]))

    def _numbered(self, constants: Sequence[Tensor], site: Site) -> tuple[tuple[int, int], Site] | None:
        if any(id(tensor) not in self._leaves for tensor in constants):
            return None
        key = id(constants[0])
        self._seen[key] += 1
        return (key, self._seen[key]), site


@final
class Reference:
    """The moments of the float network on the images of a run, by site of a whole forward pass."""

    def __init__(self, leaves: frozenset[int]) -> None:
        self.leaves = leaves
        self._moments: dict[tuple[int, int], Moments] = {}
        self._layers: dict[int, tuple[weakref.ref[Tensor], tuple[int, int]]] = {}  # by id of a biased layer's output

    def note(self, site: tuple[tuple[int, int], Site] | None, read: Any) -> None:
        """What a call of the float pass reads first: a layer that a norm reads is corrected there."""
        held = self._layers.get(id(read))
        if held is not None and held[0]() is read and site is not None and site[1].norm is not None:
            self._moments.pop(held[1], None)

    def add(self, site: tuple[tuple[int, int], Site] | None, values: Any) -> None:
        """Take up a value of the float pass."""
        self._layers.pop(id(values), None)  # Changed in place or passed on: it is not the layer's output any more.
        if site is None:
            return
        key, where = site
        if where.norm is None:
            self._layers[id(values)] = (weakref.ref(values), key)
        self._moments[key] = Moments.of(values, where)

    def correct(self, site: tuple[tuple[int, int], Site] | None, values: Tensor) -> Tensor:
        """Correct a value of a quantized pass in place, where the float pass had it."""
        moments = None if site is None else self._moments.get(site[0])
        return values if site is None or moments is None else correct(values, site[1], moments)

    def corrected(self, site: tuple[tuple[int, int], Site] | None, values: Tensor) -> Tensor:
        """The same as a new tensor, the statistics taken as constants by gradients."""
        moments = None if site is None else self._moments.get(site[0])
        return values if site is None or moments is None else corrected(values, site[1], moments)
