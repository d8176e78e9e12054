"""DuQ: a quantizer that learns where inputs are clipped and how large outputs are, apart from each other."""

from __future__ import annotations

import math
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mpq_plugins.errors import PrecisionError

_WEIGHT_SHARE = 0.9
_ACTIVATION_QUANTILE = 0.95


def n_levels(bits: int, *, signed: bool) -> int:
    """The largest code q: 2^(b-1) - 1 signed, 2^b - 1 unsigned. Raises `PrecisionError` below two bits."""
    if bits < 2:
        raise PrecisionError(
            f"DuQ needs at least 2 bits, not {bits}: one signed bit leaves no code but 0. Use a binary quantizer."
        )
    return (1 << bits - 1) - 1 if signed else (1 << bits) - 1


def duq(x: Tensor, a: Tensor, c: Tensor, *, bits: int, signed: bool) -> Tensor:
    """c round(q clip(x / a, -1, 1)) / q, or with clip(relu(x) / a, 0, 1) when unsigned; `a` and `c` are scalars > 0.

    Rounds half to even, straight through: the derivatives are c / a by x and -c x / a^2 by a inside the clip, 0 outside, and
    round(q clip(x / a)) / q by c (DuQ, PROFIT, Park and Yoo 2020, section 4). The ends of the clip count as
    outside, as in `hardtanh`; `clamp` differs between versions of torch. Keeps x alone for the backward pass.
    """
    result: Tensor = _Duq.apply(x, a, c, n_levels(bits, signed=signed), signed)
    return result


def _codes(x: Tensor, a: Tensor, q: int, signed: bool) -> Tensor:
    return torch.round(q * (x / a).clamp(-1 if signed else 0, 1))


class _Duq(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, c: Tensor, q: int, signed: bool) -> Tensor:
        ctx.save_for_backward(x, a, c)
        ctx.q, ctx.signed = q, signed
        return c * _codes(x, a, q, signed) / q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, a, c = ctx.saved_tensors
        inside = (x.abs() < a) if ctx.signed else (x > 0) & (x < a)
        passing = torch.where(inside, gradient, 0)
        by_a = -(c / a.square()) * (passing * x).sum()
        by_c = (gradient * _codes(x, a, ctx.q, ctx.signed)).sum() / ctx.q
        return passing * (c / a), by_a.reshape(a.shape), by_c.reshape(c.shape), None, None


def inverse_softplus(value: Tensor) -> Tensor:
    """The x whose softplus, ln(1 + e^x), is `value` > 0."""
    return value + torch.log(-torch.expm1(-value))


@final
class DuQ(nn.Module):
    """The DuQ quantizer of one tensor: a = softplus(alpha), c = softplus(gamma), both learned.

    `calibrate_weight` starts a = c at 0.9 of the largest magnitude, `calibrate_activation` at the 95th percentile of what
    is quantized (PROFIT, section 4). `bits` may be changed at any time.
    """

    def __init__(self, bits: int, *, signed: bool) -> None:
        super().__init__()
        n_levels(bits, signed=signed)  # refuses what it cannot be
        self.bits, self.signed = bits, signed
        start = inverse_softplus(torch.tensor(1.0))
        self.alpha, self.gamma = nn.Parameter(start.clone()), nn.Parameter(start.clone())

    @property
    def a(self) -> Tensor:
        """Where inputs are clipped."""
        return F.softplus(self.alpha)

    @property
    def c(self) -> Tensor:
        """The output of the largest code."""
        return F.softplus(self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, quantized."""
        return duq(x, self.a, self.c, bits=self.bits, signed=self.signed)

    def calibrate_weight(self, weight: Tensor) -> None:
        """Start at 0.9 max |w|."""
        self.set_range(weight_range(weight))

    def calibrate_activation(self, values: Tensor) -> None:
        """Start at the 95th percentile of |x| (of relu(x) when unsigned) without zeros."""
        self.set_range(activation_range(values, signed=self.signed))

    @torch.no_grad()
    def set_range(self, value: Tensor) -> None:
        """Start both a and c at `value`; a tensor of zeros has no range and starts at 1."""
        value = torch.where(value > 0, value, torch.ones_like(value))
        for parameter in (self.alpha, self.gamma):
            parameter.copy_(inverse_softplus(value.to(parameter.dtype)))

    def extra_repr(self) -> str:
        """Bits and sign."""
        return f"bits={self.bits}, signed={self.signed}"


def weight_range(weight: Tensor) -> Tensor:
    """0.9 max |w|."""
    return _WEIGHT_SHARE * weight.detach().abs().max()


def activation_range(values: Tensor, *, signed: bool) -> Tensor:
    """The 95th percentile of |x|, or of relu(x), without zeros: the smallest value that 95 % of the others do not exceed."""
    magnitudes = (values.detach().abs() if signed else values.detach().relu()).flatten()
    magnitudes = magnitudes[magnitudes > 0]  # as the published code does; pruned units would pull the range to 0
    if not len(magnitudes):
        return values.new_zeros(())
    rank = math.ceil(_ACTIVATION_QUANTILE * len(magnitudes))
    return magnitudes.kthvalue(rank).values
