"""What quantization did to a network, measured on the same inputs through both, and taken back in place.

Batch normalisation keeps its trained statistics, moved by the difference. Biases give up the difference of the layer's mean
output. Both go in the order of the forward pass, those before already corrected, and need one pass of each network.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from judge import called
from torch import Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RATIO = (0.1, 10.0)


@torch.no_grad()
def correct_batch_norm(reference: nn.Module, module: nn.Module, batches: Sequence[Any]) -> None:
    """Move trained means by m_q - m_f and variances by v_q / v_f (within 0.1 .. 10), averaged over batches.

    The core's own correction goes through each batch with the mean of those before, here a batch has its own; and the float
    network runs once for all plans.
    """
    norms, originals = dict(module.named_modules()), dict(reference.named_modules())
    names = [name for name, norm in norms.items() if isinstance(norm, _NORMS) and norm.track_running_stats]
    moments = _float_moments(reference, batches, names)
    means: dict[str, list[Tensor]] = {name: [] for name in names}
    ratios: dict[str, list[Tensor]] = {name: [] for name in names}

    def move(name: str) -> Callable[..., None]:
        def hook(norm: Any, inputs: tuple[Tensor, ...]) -> None:
            mean, variance = _moments(inputs[0])
            mean_f, variance_f = moments[name][len(means[name])]
            means[name].append(mean - mean_f)
            ratios[name].append((variance / variance_f.clamp(min=1e-12)).clamp(*_RATIO).log())
            norm.running_mean.copy_(originals[name].running_mean + means[name][-1])
            norm.running_var.copy_(originals[name].running_var * ratios[name][-1].exp())

        return hook

    hooks = [norms[name].register_forward_pre_hook(move(name)) for name in names]
    try:
        for inputs in batches:
            called(module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if means[name]:
            norms[name].running_mean.copy_(originals[name].running_mean + torch.stack(means[name]).mean(dim=0))
            norms[name].running_var.copy_(originals[name].running_var * torch.stack(ratios[name]).mean(dim=0).exp())


# The float network sees the same batches for every plan that is judged.
_KEPT: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, list[tuple[Tensor, Tensor]]]]] = weakref.WeakKeyDictionary()


def _float_moments(
    reference: nn.Module, batches: Sequence[Any], names: Sequence[str]
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    kept = _KEPT.get(reference)
    if kept is not None and kept[0] is batches:
        return kept[1]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name].append(_moments(inputs[0]))

        return hook

    originals = dict(reference.named_modules())
    hooks = [originals[name].register_forward_pre_hook(keep(name)) for name in names]
    try:
        for inputs in batches:
            called(reference, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    _KEPT[reference] = (batches, found)
    return found


@torch.no_grad()
def correct_biases(reference: nn.Module, module: nn.Module, batches: Sequence[Any], layers: Iterable[str]) -> None:
    """Take the difference of mean outputs per channel out of the biases of `layers` that have one."""
    theirs, ours = dict(reference.named_modules()), dict(module.named_modules())
    names = [name for name in layers if getattr(ours.get(name), "bias", None) is not None]
    found: dict[str, Tensor] = {}
    shifts: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            found[name] = output

        return hook

    def move(name: str) -> Callable[..., Tensor]:
        def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
            difference = output - found.pop(name)
            axis = -1 if isinstance(layer, nn.Linear) else 1
            others = [dim for dim in range(output.dim()) if dim != axis % output.dim()]
            shift = difference.mean(dim=others, keepdim=True)
            shifts[name].append(shift.flatten())
            return output - shift

        return hook

    hooks = [theirs[name].register_forward_hook(keep(name)) for name in names]
    hooks += [ours[name].register_forward_hook(move(name)) for name in names]
    try:
        for inputs in batches:
            called(reference, inputs)
            called(module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if shifts[name]:
            ours[name].bias -= torch.stack(shifts[name]).mean(dim=0)


def _moments(values: Tensor) -> tuple[Tensor, Tensor]:
    rows = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)  # [N, channel, position]
    n = rows.shape[0] * rows.shape[2]
    mean = rows.sum(dim=2).sum(dim=0) / n
    # torch.var_mean takes seven times as long over these axes.
    second = torch.linalg.vector_norm(rows, dim=2).square().sum(dim=0) / n
    return mean, (second - mean.square()).clamp(min=0)
