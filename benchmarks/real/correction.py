"""What quantization did to a network, measured on the same inputs through both, and taken back in place.

Batch normalisation keeps its trained statistics, moved by the difference. Layers of a network without batch normalisation
get the difference of their mean output into the bias. Both go in the order of the forward pass, those before already
corrected, and need one pass of each network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from judge import called
from torch import Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_RATIO = (0.1, 10.0)


def repair(reference: nn.Module, module: nn.Module, batches: Sequence[Any], layers: Iterable[str]) -> nn.Module:
    """`module` corrected in place: its batch normalisations, or the biases of `layers` where it has none."""
    if any(isinstance(child, _NORMS) for child in module.modules()):
        correct_batch_norm(reference, module, batches)
    else:
        correct_biases(reference, module, batches, layers)
    return module


@torch.no_grad()
def correct_batch_norm(reference: nn.Module, module: nn.Module, batches: Sequence[Any]) -> None:
    """Move trained means by m_q - m_f and variances by v_q / v_f (within 0.1 .. 10), averaged over batches."""
    names = [name for name, norm in module.named_modules() if isinstance(norm, _NORMS) and norm.track_running_stats]
    norms, originals = dict(module.named_modules()), dict(reference.named_modules())
    trained = {name: (originals[name].running_mean.clone(), originals[name].running_var.clone()) for name in names}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    means: dict[str, list[Tensor]] = {name: [] for name in names}
    ratios: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[name] = _moments(inputs[0])

        return hook

    def move(name: str) -> Callable[..., None]:
        def hook(norm: Any, inputs: tuple[Tensor, ...]) -> None:
            mean, variance = _moments(inputs[0])
            means[name].append(mean - found[name][0])
            ratios[name].append((variance / found[name][1].clamp(min=1e-12)).clamp(*_RATIO).log())
            norm.running_mean.copy_(trained[name][0] + means[name][-1])
            norm.running_var.copy_(trained[name][1] * ratios[name][-1].exp())

        return hook

    hooks = [originals[name].register_forward_pre_hook(keep(name)) for name in names]
    hooks += [norms[name].register_forward_pre_hook(move(name)) for name in names]
    try:
        for inputs in batches:
            called(reference, inputs)
            called(module, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if means[name]:
            norms[name].running_mean.copy_(trained[name][0] + torch.stack(means[name]).mean(dim=0))
            norms[name].running_var.copy_(trained[name][1] * torch.stack(ratios[name]).mean(dim=0).exp())


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
    others = [dim for dim in range(values.dim()) if dim != 1]
    variance, mean = torch.var_mean(values, dim=others, correction=0)
    return mean, variance
