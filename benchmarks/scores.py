"""CPU seconds and peak memory of the scores, against the bare forward pass and the published procedures.

    python benchmarks/scores.py                        # ResNet-18, ResNet-50 and MobileNetV2, N = 32 at 224x224
    python benchmarks/scores.py --models resnet18 --published resnet18

Random weights and images: the cost does not depend on them. Seconds are the least of `--repeats` runs in one process, taken in
turns, which other work on the machine disturbs least; only ratios within one model mean anything elsewhere. Memory is
the growth of the peak resident size, each in a process of its own (Linux only).
"""

from __future__ import annotations

import argparse
import gc
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from mpq_plugins import Space, find_layers, residual_ties
from mpq_plugins.model.run import evaluating
from mpq_plugins.model.watch import FeatureWatch
from mpq_plugins.proxies import CSMPQ, OMPQ

Subject = Callable[[nn.Module, Space, Tensor], object]


def forward(model: nn.Module, space: Space, images: Tensor) -> None:
    """The bare forward pass."""
    with evaluating(model):
        model(images)


def ompq(model: nn.Module, space: Space, images: Tensor) -> None:
    """The whole OMPQ score."""
    OMPQ(n_images=len(images)).score(model, space, [images])


def csmpq(model: nn.Module, space: Space, images: Tensor) -> None:
    """The whole CSMPQ score."""
    CSMPQ(n_images=len(images)).score(model, space, [images])


def published_ompq(model: nn.Module, space: Space, images: Tensor) -> None:
    """The published procedure: all features stored, both Gram matrices again for every ordered pair."""
    features = [feature.flatten(1).numpy() for feature in _stored(model, space, images)]
    for first in features:
        for second in features:
            _published_orm(first @ first.T, second @ second.T)


def published_csmpq(model: nn.Module, space: Space, images: Tensor) -> None:
    """The published procedure: all features stored, then rectified, pooled and counted."""
    for feature in _stored(model, space, images):
        rectified = torch.relu(feature)
        pooled = (rectified.mean(dim=(2, 3)) if feature.dim() == 4 else rectified).T
        in_set = pooled >= pooled.mean(dim=1, keepdim=True)
        frequency = (pooled / pooled.sum(dim=0) * in_set).sum(dim=1) / in_set.sum(dim=1)
        float((frequency * torch.log(pooled.shape[1] / (in_set.sum(dim=1) + 1.0))).mean())


def _stored(model: nn.Module, space: Space, images: Tensor) -> list[Tensor]:
    stored: dict[str, Tensor] = {}
    last_layers = [space.layer(unit.layers[-1]) for unit in space.units]

    def keep(names: tuple[str, ...], feature: Tensor) -> None:
        stored.update(dict.fromkeys(names, feature.clone()))  # A later in-place operation must not change it.

    with evaluating(model), FeatureWatch(model, last_layers, keep):
        model(images)
    return [stored[layer.name] for layer in last_layers]


def _published_orm(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(0) - first.mean(1)[:, None] + first.mean(), second - second.mean(0)
    second = second - second.mean(1)[:, None]
    return float((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))


SUBJECTS: dict[str, Subject] = {
    "forward": forward,
    "ompq": ompq,
    "csmpq": csmpq,
    "published ompq": published_ompq,
    "published csmpq": published_csmpq,
}


def setting(name: str, n_images: int, size: int) -> tuple[nn.Module, Space, Tensor]:
    """A model with the units of the papers, and images."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    inventory = find_layers(model, torch.randn(1, 3, size, size))
    return model, Space.build(inventory, tie=residual_ties(inventory)), torch.randn(n_images, 3, size, size)


def cpu_seconds() -> float:
    """User and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_seconds(name: str, subjects: list[str], args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Least (CPU seconds, wall seconds) of every subject, run in turns after one warm-up."""
    model, space, images = setting(name, args.images, args.size)
    forward(model, space, images)
    runs: dict[str, list[tuple[float, float]]] = {subject: [] for subject in subjects}
    for repeat in range(args.repeats):
        for subject in subjects:
            if subject.startswith("published") and repeat > 0:
                continue  # Far off, so one run says enough.
            gc.collect()
            cpu, wall = cpu_seconds(), time.perf_counter()
            SUBJECTS[subject](model, space, images)
            runs[subject].append((cpu_seconds() - cpu, time.perf_counter() - wall))
    return {subject: (min(cpu for cpu, _ in found), min(wall for _, wall in found)) for subject, found in runs.items()}


def peak_growth_mb(name: str, subject: str, args: argparse.Namespace) -> float:
    """Growth of the peak resident size while `subject` runs, in MB, in a process of its own."""
    options = ["--memory-of", subject, "--models", name, "--images", str(args.images), "--size", str(args.size)]
    command = [sys.executable, __file__, *options, "--threads", str(args.threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_growth(name: str, subject: str, args: argparse.Namespace) -> None:
    model, space, images = setting(name, args.images, args.size)
    # Code and thread pools that the first call loads are no part of the growth.
    SUBJECTS[subject](model, space, images[:4, :, :64, :64])
    before = peak_mb()
    SUBJECTS[subject](model, space, images)
    print(peak_mb() - before)


def peak_mb() -> float:
    """Peak resident size of this process; getrusage would start at the parent's."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--published", nargs="*", default=["resnet18"], help="models to time the published procedures on")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=SUBJECTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print_growth(args.models[0], args.memory_of, args)
        return
    print(f"N = {args.images} at {args.size}x{args.size}, {args.threads} threads, torch {torch.__version__}")
    print(f"{'model':14} {'':16} {'CPU s':>8} {'wall s':>8} {'ratio':>6} {'peak +MB':>9}")
    for name in args.models:
        subjects = [key for key in SUBJECTS if not key.startswith("published") or name in args.published]
        seconds = measure_seconds(name, subjects, args)
        for subject in subjects:
            cpu, wall = seconds[subject]
            growth = peak_growth_mb(name, subject, args)
            print(f"{name:14} {subject:16} {cpu:8.2f} {wall:8.2f} {cpu / seconds['forward'][0]:6.2f} {growth:9.0f}", flush=True)


if __name__ == "__main__":
    main()
