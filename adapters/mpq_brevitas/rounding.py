"""Rounding that sees the data: GPTQ, GPFQ and Qronos of Brevitas, and learned rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from mpq_brevitas import brevitas_internals as brevitas
from mpq_brevitas.modules import get_layer, given_by_position
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.run import Batch, call
from mpq_plugins.space.bits import BitConfig

_ORIGINAL = "weight_orig"  # where Brevitas looks for the weight to compute with while quantization is off
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_rounding(module: nn.Module, bits: BitConfig, ptq: PTQ) -> None:
    """Raise `AdapterError` for layers whose weights cannot be rounded as asked."""
    if ptq.rounding == "nearest":
        return
    binary = [name for name, precision in bits.layers.items() if precision.weight == 1]
    if binary:
        raise AdapterError(
            f'rounding="{ptq.rounding}" chooses between neighbouring integer codes, which the binary weights of '
            f'{", ".join(binary)} do not have. Use rounding="nearest", or give them 2 bits.'
        )
    holders: dict[int, str] = {}
    for name in bits.layers:
        first = holders.setdefault(id(get_layer(module, name).weight), name)
        if first != name:
            raise AdapterError(
                f'rounding="{ptq.rounding}" would choose the codes of the weight that {first} and {name} share twice, '
                'once for each. Use rounding="nearest".'
            )
    transposed = [name for name in bits.layers if isinstance(get_layer(module, name), _TRANSPOSED)]
    if transposed and ptq.rounding != "learned":
        raise AdapterError(
            f"Brevitas' {ptq.rounding} leaves out transposed convolutions ({', '.join(transposed)}). "
            'Use rounding="learned" or "nearest".'
        )


@contextlib.contextmanager
def originals_kept(module: nn.Module, bits: BitConfig) -> Iterator[None]:
    """Keep the weights as they are now, for the float side of what is computed meanwhile; gone afterwards."""
    layers = [get_layer(module, name) for name in bits.layers]
    for layer in layers:
        layer.register_buffer(_ORIGINAL, layer.weight.detach().clone(), persistent=False)
    try:
        yield
    finally:
        for layer in layers:
            layer._buffers.pop(_ORIGINAL, None)


def round_weights(module: nn.Module, bits: BitConfig, batches: Sequence[Batch], ptq: PTQ) -> None:
    """Change weights so that rounding them to the nearest code gives the codes that the method chose; in place.

    Needs calibrated ranges, which stay, and `originals_kept`.
    """
    if ptq.rounding == "nearest":
        return
    with given_by_position(module, bits.layers):
        if ptq.rounding == "learned":
            from mpq_brevitas.learned_round import learn_rounding

            learn_rounding(module, bits, batches, ptq.rounding_steps)
        else:
            _round_greedily(module, batches, ptq.rounding)


def _round_greedily(module: nn.Module, batches: Sequence[Batch], method: str) -> None:
    with brevitas.guarded(), torch.no_grad(), _own_forward(module), brevitas.greedy_rounding(module, method) as rounding:
        for _ in range(rounding.num_layers):
            for batch in batches:
                call(rounding.model, batch.inputs)
            rounding.update()
    module.eval()


@contextlib.contextmanager
def _own_forward(module: Any) -> Iterator[None]:
    """Undo what Brevitas' modes leave behind: a forward method bound to this very module."""
    try:
        yield
    finally:
        if isinstance(module, brevitas.GraphModule):
            module.recompile()
        else:
            vars(module).pop("forward", None)
