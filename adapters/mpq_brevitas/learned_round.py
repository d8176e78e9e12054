"""Learned rounding, one layer after the other: AdaRound (Nagel et al. 2020) with the pieces that Brevitas has of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.modules import get_layer
from mpq_plugins.common.progress import track
from mpq_plugins.model.run import Batch, call, evaluating
from mpq_plugins.space.bits import BitConfig

_N_IMAGES = 256  # at most, whose inputs of one layer are kept
_BATCH_SIZE = 32
_RATE = 1e-2


class _Reached(Exception):
    """The layer whose input is wanted was called; the rest of the forward pass is not needed."""


def learn_rounding(module: nn.Module, bits: BitConfig, batches: Sequence[Batch], n_steps: int) -> None:
    """Learn for every weight whether its code is rounded up or down, so that the layer's output comes close to the float one's.

    Layers are taken in the order of their calls; each sees the inputs that the quantized layers before it give, and
    aims at the output of the float model. Weights become the chosen codes times their scales.
    """
    used = _first_images(batches)
    with brevitas.guarded():
        for name in track(_call_order(module, bits, used[0]), "learned rounding"):
            layer = get_layer(module, name)
            inputs = _seen(module, layer, used, lambda part, x: brevitas.plain(part.input_quant(x)))
            with brevitas.without_quantization(module):
                targets = _seen(module, layer, used, lambda part, x: part.inner_forward_impl(x, part.quant_weight(), part.bias))
            _learn(layer, inputs, targets, n_steps)


def _first_images(batches: Sequence[Batch]) -> list[Batch]:
    used, n_images = [], 0
    for batch in batches:
        if n_images >= _N_IMAGES:
            break
        used.append(batch.part(0, _N_IMAGES - n_images))
        n_images += len(used[-1])
    return used


def _call_order(module: nn.Module, bits: BitConfig, batch: Batch) -> list[str]:
    """Every layer once, in the order of first calls."""
    order: dict[str, None] = {}
    handles = [
        get_layer(module, name).register_forward_pre_hook(lambda _module, _inputs, name=name: order.setdefault(name))
        for name in bits.layers
    ]
    try:
        with evaluating(module):
            call(module, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


def _seen(module: nn.Module, layer: Any, batches: Sequence[Batch], of: Callable[[Any, Any], Tensor]) -> list[Tensor]:
    """What `of` makes of the layer and its input, batch by batch."""
    found: list[Tensor] = []

    def stop(part: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(brevitas.plain(of(part, brevitas.plain(inputs[0]))))
        raise _Reached

    handle = layer.register_forward_pre_hook(stop)
    try:
        with evaluating(module):
            for batch in batches:
                with contextlib.suppress(_Reached):
                    call(module, batch.inputs)
    finally:
        handle.remove()
    return found


def _learn(layer: Any, inputs: Sequence[Tensor], targets: Sequence[Tensor], n_steps: int) -> None:
    x, wanted = torch.cat(list(inputs)), torch.cat(list(targets))
    bias = None if layer.bias is None else layer.bias.detach()
    channels = -1 if isinstance(layer, nn.Linear) else 1
    generator = torch.Generator().manual_seed(0)
    with brevitas.learned_rounding(layer) as rounding, torch.enable_grad():
        regularisation = brevitas.rounding_regularisation(layer, n_steps)
        optimizer = torch.optim.Adam([rounding.value], _RATE)
        for _ in range(n_steps):
            chosen = torch.randint(len(x), (min(_BATCH_SIZE, len(x)),), generator=generator)
            output = layer.inner_forward_impl(x[chosen], brevitas.plain(layer.quant_weight()), bias)
            error = (output - wanted[chosen]).square().sum(channels).mean()
            (rounding.value.grad,) = torch.autograd.grad(error + regularisation(output, output), [rounding.value])
            optimizer.step()
        rounding.eval()
        with torch.no_grad():
            layer.weight.copy_(brevitas.plain(layer.quant_weight()))
