"""Batch-normalisation statistics of the quantized model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_plugins._model import batches_of, call

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_JOINED_IMAGES = 32


def reestimate_batch_norm(module: nn.Module, batches: Iterable[Any], *, held: Collection[str] = ()) -> int:
    """Replace the running statistics of every batch normalisation but those in `held` by their mean over `batches`, in place.

    Quantized weights and activations shift the statistics that the float model was trained with; this repairs
    them without labels or gradients. `batches` are items that `Batch.of` reads; where one has a single image, plain tensors
    are joined to larger batches.
    Only the statistics change: the other modules run in evaluation mode, modes come back afterwards.
    Returns the number of batches used; with none, or without batch normalisation, nothing changes.
    """
    norms = [norm for name, norm in module.named_modules() if name not in held and _has_statistics(norm)]
    if not norms:
        return 0
    modes = [(child, child.training) for child in module.modules()]
    momenta = [norm.momentum for norm in norms]
    before = [(norm.running_mean, norm.running_var, norm.num_batches_tracked) for norm in norms]
    n_batches = 0
    try:
        module.eval()
        for norm in norms:
            norm.train()
            # Fresh buffers, so that an interrupted run can put the old ones back.
            norm.running_mean, norm.running_var, norm.num_batches_tracked = (
                None if buffer is None else torch.zeros_like(buffer)
                for buffer in (norm.running_mean, norm.running_var, norm.num_batches_tracked)
            )
            norm.momentum = None  # torch's cumulative average
        with torch.no_grad():
            for inputs in _whole_batches([batch.inputs for batch in batches_of(batches)]):
                call(module, inputs)
                n_batches += 1
    except BaseException:
        n_batches = 0
        raise
    finally:
        for norm, momentum, (mean, variance, count) in zip(norms, momenta, before, strict=True):
            norm.momentum = momentum
            if n_batches == 0:
                norm.running_mean, norm.running_var, norm.num_batches_tracked = mean, variance, count
        for child, training in modes:
            child.training = training
    return n_batches


def _whole_batches(inputs: list[Any]) -> Sequence[Any]:
    """Inputs, single images joined to batches of equal size when they are plain tensors."""
    if all(isinstance(item, Tensor) for item in inputs) and any(len(item) < 2 for item in inputs):
        n_images = sum(len(item) for item in inputs)
        return torch.cat(inputs).tensor_split(math.ceil(n_images / _JOINED_IMAGES))
    return inputs


def copy_statistics(source: nn.Module, module: nn.Module, names: Iterable[str]) -> None:
    """Give the named batch normalisations of `module` the running statistics they have in `source`; other names are left."""
    theirs, ours = dict(source.named_modules()), dict(module.named_modules())
    for name in names:
        if name in theirs and name in ours and _has_statistics(theirs[name]) and _has_statistics(ours[name]):
            for key, buffer in theirs[name].named_buffers(recurse=False):
                with torch.no_grad():
                    ours[name].get_buffer(key).copy_(buffer)


def _has_statistics(norm: nn.Module) -> bool:
    return isinstance(norm, _NORMS) and norm.track_running_stats
