"""NNCF's fake quantization on the CPU in torch's own operations, and a word before its CUDA kernels are compiled.

NNCF compiles a C++ extension for a minute or more at the first quantized forward pass. On the CPU that extension is a list of
torch operations (nncf/torch/extensions/src/quantization/cpu), so the same list called from Python gives the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger("mpq_plugins.nncf")


class TorchFunctions:
    """What NNCF's compiled CPU extension offers, under the names that NNCF asks for."""

    @staticmethod
    def Quantize_forward(values: Tensor, low: Tensor, extent: Tensor, levels: int) -> Tensor:
        """`values` on the nearest of `levels` codes from `low` to `low + extent`."""
        if extent.device.type == "cpu" and values.dtype == torch.float32 and _is_one_range(values, low, extent):
            return _one_range(values, low.flatten()[:1], extent.flatten()[:1], levels)
        # Not (levels - 1) / extent: that is a product with the reciprocal, and one rounding more.
        scale = torch.full_like(extent, levels - 1) / extent
        output = torch.clamp(values, low, low + extent)
        zero_point = (-low * scale).round_()
        output -= low
        output *= scale
        output -= zero_point
        return output.round_().div_(scale)

    @staticmethod
    def Quantize_backward(
        gradient: Tensor,
        values: Tensor,
        low: Tensor,
        extent: Tensor,
        levels: int,
        level_low: int,
        level_high: int,
        is_asymmetric: bool = False,
    ) -> list[Tensor]:
        """Gradients of values, low and extent: straight through inside the range, to its ends outside."""
        too_high, too_low = values > low + extent, values < low
        of_extent = TorchFunctions.Quantize_forward(values, low, extent, levels).sub_(values).mul_(1 / extent)
        of_extent = of_extent.masked_fill_(too_high, 1).masked_fill_(too_low, level_low / level_high).mul_(gradient)
        outside = too_high | too_low
        of_low = _summed(gradient.masked_fill(~outside, 0), low) if is_asymmetric else torch.empty_like(low)
        return [gradient.masked_fill(outside, 0), of_low, _summed(of_extent, extent)]


def _is_one_range(values: Tensor, low: Tensor, extent: Tensor) -> bool:
    """Whether all channels have one range, where that is quick to see: at 8 bits those of a depthwise layer do."""
    if extent.numel() == 1:
        return True
    few = 16 * extent.numel() < values.numel()
    return few and bool((extent == extent.flatten()[0]).all()) and bool((low == low.flatten()[0]).all())


def _one_range(values: Tensor, low: Tensor, extent: Tensor, levels: int) -> Tensor:
    """The same with one range for all values: numbers in place of tensors, and nothing done that changes nothing."""
    scale = torch.full_like(extent, levels - 1) / extent
    zero_point = (-low * scale).round_()
    output = values.clamp(float(low), float(low + extent))
    if float(low) != 0:
        output -= float(low)
    output *= float(scale)
    if float(zero_point) != 0:
        output -= float(zero_point)
    return output.round_().div_(float(scale))


def _summed(values: Tensor, like: Tensor) -> Tensor:
    """Summed over every axis where `like` has one entry, one axis after the other."""
    if values.numel() == 1:
        return values.sum().view_as(like)
    for axis in range(like.dim()):
        if like.shape[axis] == 1:
            values = values.sum(axis, keepdim=True)
    return values


def spare_compiling(cpu: Any, cuda: Any) -> None:
    """Let NNCF quantize on the CPU without its extension, unless that is loaded; tell before CUDA kernels are compiled.

    `cpu` and `cuda` are NNCF's namespaces of compiled functions. The whole process is affected, with equal numbers.
    """
    if cpu._loaded_namespace is None:
        cpu._loaded_namespace = TorchFunctions
    if torch.cuda.is_available():
        cuda._loader.load = _telling(cuda._loader.load, cuda._loader.get_build_dir)


def _telling(load: Callable[[], Any], folder: Callable[[], str]) -> Callable[[], Any]:
    def tell_and_load() -> Any:
        if not any(Path(folder()).glob("*.so")):
            _LOG.warning("NNCF compiles its CUDA quantizers now, once for this version of torch: a minute or more")
        return load()

    return tell_and_load
