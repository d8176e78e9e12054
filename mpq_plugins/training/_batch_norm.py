"""Batch-normalisation statistics of the quantized model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mpq_plugins._model import batches_of, call

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def reestimate_batch_norm(module: nn.Module, batches: Iterable[Any]) -> int:
    """Replace the running statistics of every batch normalisation by their mean over `batches`, in place.

    Quantized weights and activations shift the statistics that the float model was trained with; this repairs
    them without labels or gradients. `batches` are items that `Batch.of` reads, each of at least two images.
    Only the statistics change: the other modules run in evaluation mode, modes come back afterwards.
    Returns the number of batches used; with none, or without batch normalisation, nothing changes.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _NORMS) and norm.track_running_stats]
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
            for batch in batches_of(batches):
                call(module, batch.inputs)
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
