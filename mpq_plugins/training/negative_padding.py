"""Unsigned quantization of what a hard swish gives, and convolutions that pad with its minimum.

A hard swish has the minimum -3/8, so its output is no ReLU's, yet a signed quantizer would waste half of its codes. Shifted by
3/8 it can be quantized unsigned: x is then u - 3/8, u = Q(x + 3/8). A convolution that pads x with -3/8 pads u with 0, and

    conv(pad(x, -3/8), W) = conv(pad(u, 0), W) - 3/8 sum(W)

holds at the borders too, so that the offset is one constant per output channel, a part of the bias (negative padding, PROFIT,
Park and Yoo 2020, section 4). Padded with 0, x would need another constant at every distance from the border.
"""

from __future__ import annotations

import copy
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.errors import ModelError

HARDSWISH_OFFSET = 3 / 8
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@final
class Shifted(nn.Module):
    """`quantizer` of x + offset, shifted back: an unsigned quantizer for values from -offset on.

    Calibrate the quantizer on x + offset.
    """

    def __init__(self, quantizer: nn.Module, offset: float = HARDSWISH_OFFSET) -> None:
        super().__init__()
        self.quantizer, self.offset = quantizer, offset

    def forward(self, x: Tensor) -> Tensor:
        """`x`, quantized to values from -offset on."""
        quantized: Tensor = self.quantizer(x + self.offset)
        return quantized - self.offset


def negatively_padded(layer: nn.Module, x: Tensor, weight: Tensor, *, offset: float = HARDSWISH_OFFSET) -> Tensor:
    """The layer's output with `weight` on `x`, which holds values from -offset on, padded with -offset: the explicit way.

    For convolutions, however grouped, strided and dilated, and for linear layers, which pad nothing.
    Raises `ModelError` for transposed convolutions and other padding modes.
    """
    bias = layer.bias
    assert bias is None or isinstance(bias, Tensor)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    layer = _convolution(layer)
    padded = F.pad(x, _pads(layer), value=-offset)
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[len(layer.kernel_size) - 1]
    return convolve(padded, weight, bias, layer.stride, 0, layer.dilation, layer.groups)


def folded_offset(weight: Tensor, *, offset: float = HARDSWISH_OFFSET) -> Tensor:
    """-offset sum(W) per output channel: what the bias takes up when a layer reads x + offset instead of x."""
    return -offset * weight.flatten(1).sum(dim=1)


def with_offset_in_bias(layer: nn.Module, weight: Tensor | None = None, *, offset: float = HARDSWISH_OFFSET) -> nn.Module:
    """A copy of a layer that reads u = x + offset, padded with 0, and gives what the layer gives on x padded with -offset.

    `weight` is the quantized weight where that is not the layer's own. A layer followed by batch normalisation needs no
    copy: re-estimated statistics take the constant up.
    """
    if not isinstance(layer, nn.Linear):
        _convolution(layer)
    weight = layer.weight if weight is None else weight  # type: ignore[assignment]  # torch says Tensor | Module
    assert isinstance(weight, Tensor)
    folded = copy.deepcopy(layer)
    constant = folded_offset(weight.detach(), offset=offset)
    bias = constant if layer.bias is None else layer.bias.detach() + constant  # type: ignore[operator]
    folded.bias = nn.Parameter(bias)
    return folded


def _convolution(layer: nn.Module) -> Convolution:
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or layer.padding_mode != "zeros":
        mode = getattr(layer, "padding_mode", None)
        raise ModelError(
            f"negative padding is for convolutions padded with zeros and linear layers, not {type(layer).__name__} with "
            f"padding mode {mode!r}. Quantize its input with a signed quantizer."
        )
    return layer


def _pads(layer: Convolution) -> list[int]:
    """What `F.pad` takes: before and after, the last axis first."""
    if isinstance(layer.padding, str):
        reaches = [dilation * (size - 1) for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(reach // 2, reach - reach // 2) if layer.padding == "same" else (0, 0) for reach in reaches]
    else:
        sides = [(width, width) for width in layer.padding]
    return [width for side in reversed(sides) for width in side]
