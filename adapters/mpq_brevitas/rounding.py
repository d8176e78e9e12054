"""Rounding that sees the data: GPTQ, GPFQ and Qronos of Brevitas, and AdaRound (Nagel et al. 2020) from its pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import internals as brevitas
from mpq_plugins.adapter.hooks import call_order, hooked
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.common.progress import track
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.run import Batch, call, evaluating
from mpq_plugins.space.bits import BitConfig

_N_IMAGES = 256  # at most, whose inputs of one layer are kept
_BATCH_SIZE = 32
_RATE = 1e-2
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
        first = holders.setdefault(id(module.get_submodule(name).weight), name)
        if first != name:
            raise AdapterError(
                f'rounding="{ptq.rounding}" would choose the codes of the weight that {first} and {name} share twice, '
                'once for each. Use rounding="nearest".'
            )
    transposed = [name for name in bits.layers if isinstance(module.get_submodule(name), _TRANSPOSED)]
    if transposed and ptq.rounding != "learned":
        raise AdapterError(
            f"Brevitas' {ptq.rounding} leaves out transposed convolutions ({', '.join(transposed)}). "
            'Use rounding="learned" or "nearest".'
        )


@contextlib.contextmanager
def originals_kept(module: nn.Module, bits: BitConfig) -> Iterator[None]:
    """Keep the weights as they are now, for the float side of what is computed meanwhile; gone afterwards."""
    layers = [module.get_submodule(name) for name in bits.layers]
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
    # Brevitas' rounding methods see positional arguments only.
    layers = map(module.get_submodule, bits.layers)
    with hooked(layer.register_forward_pre_hook(_by_position, with_kwargs=True) for layer in layers):
        if ptq.rounding == "learned":
            learn_rounding(module, bits, batches, ptq.rounding_steps)
        else:
            _round_greedily(module, batches, ptq.rounding)


def _by_position(_layer: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return (*args, *keywords.values()), {}


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


class _Reached(Exception):
    """The layer whose input is wanted was called; the rest of the forward pass is not needed."""


def learn_rounding(module: nn.Module, bits: BitConfig, batches: Sequence[Batch], n_steps: int) -> None:
    """Learn for every weight whether its code is rounded up or down, so that the layer's output comes close to the float one's.

    Layers are taken in the order of their calls; each sees the inputs that the quantized layers before it give, and
    aims at the output of the float model. Weights become the chosen codes times their scales.
    """
    used = _first_images(batches)
    with brevitas.guarded():
        for name in track(dict.fromkeys(call_order(module, bits.layers, used[0].inputs)), "learned rounding"):
            layer = module.get_submodule(name)
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


def _seen(module: nn.Module, layer: Any, batches: Sequence[Batch], of: Callable[[Any, Any], Tensor]) -> list[Tensor]:
    """What `of` makes of the layer and its input, batch by batch."""
    found: list[Tensor] = []

    def stop(part: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.append(brevitas.plain(of(part, brevitas.plain(inputs[0]))))
        raise _Reached

    with layer.register_forward_pre_hook(stop), evaluating(module):
        for batch in batches:
            with contextlib.suppress(_Reached):
                call(module, batch.inputs)
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
