"""Devices, arithmetic and processes of a training run, through Hugging Face accelerate; and its random numbers."""

from __future__ import annotations

import contextlib
import os
import random
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mpq_plugins.common.plugins import require
from mpq_plugins.errors import TrainingError
from mpq_plugins.training.recipe import MixedPrecision


@contextlib.contextmanager
def engine(mixed_precision: MixedPrecision) -> Iterator[Any]:
    """An `Accelerator` for one run; accelerate's settings and all random numbers come back afterwards.

    Raises `MissingExtraError`, and `TrainingError` for an arithmetic that the device does not have.
    """
    accelerate = require("accelerate", "train")
    # Its settings are one object for the whole process, which would refuse another precision than an earlier run's.
    shared = require("accelerate.state", "train").AcceleratorState._shared_state
    before = dict(shared)
    shared.clear()
    try:
        with _keeping_random_state():
            yield _accelerator(accelerate, mixed_precision)
    finally:
        shared.clear()
        shared.update(before)


def _accelerator(accelerate: Any, mixed_precision: MixedPrecision) -> Any:
    n_processes = int(os.environ.get("WORLD_SIZE", "1"))
    # On a machine without a GPU accelerate joins processes only when it is told that the CPU is meant.
    on_cpu = n_processes > 1 and not torch.accelerator.is_available()
    try:
        accelerator = accelerate.Accelerator(mixed_precision=mixed_precision, cpu=on_cpu)
    except ValueError as error:
        raise TrainingError(
            f"mixed_precision={mixed_precision!r} is not to be had here: {error}. Use bf16 or no, or another device."
        ) from error
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in float32 and say nothing
        raise TrainingError("mixed_precision='fp16' is for GPUs, and here is none. Use bf16 or no.")
    if accelerator.num_processes != n_processes:
        raise TrainingError(
            f"{n_processes} processes were launched (WORLD_SIZE), and each of them would train alone: accelerate joined "
            f"{accelerator.num_processes}. Launch them with `accelerate launch` or torchrun, which also set LOCAL_RANK."
        )
    return accelerator


@contextlib.contextmanager
def _keeping_random_state() -> Iterator[None]:
    own, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(own)
        np.random.set_state(numpy)


def seed_all(seed: int, what: str) -> None:
    """Seed every generator for what begins now: a resumed run must draw what an uninterrupted one draws."""
    require("accelerate.utils", "train").set_seed(zlib.crc32(f"{seed} {what}".encode()))


def in_parallel(module: nn.Module, accelerator: Any) -> nn.Module:
    """The module as several processes train it together; accelerate's own wrapper would replace its forward method."""
    if accelerator.num_processes < 2:
        return module
    device = accelerator.device
    ids = None if device.type == "cpu" else [device.index]
    # Ranges of weights that are left in float get no gradient.
    return DistributedDataParallel(module, device_ids=ids, find_unused_parameters=True)


def agree(module: nn.Module, accelerator: Any) -> None:
    """Give every process the tensors of the first: statistics of batch normalisation are each one's own until then."""
    if accelerator.num_processes < 2:
        return
    broadcast = require("accelerate.utils", "train").broadcast
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            shared = tensor.detach().to(accelerator.device)
            tensor.copy_(broadcast(shared.to(torch.uint8) if shared.dtype == torch.bool else shared))
