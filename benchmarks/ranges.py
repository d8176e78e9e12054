"""CPU seconds and excess squared error of the scales of least squared error, beside the search of 100 thresholds they replace.

    python benchmarks/ranges.py [--models resnet18 mobilenet_v2] [--channels 2]

Weights of torchvision's initialisation, and the same made heavy-tailed (divided by the magnitude of a normal number);
bits 2..8 per output channel, one thread. Excess is over the best of 2,000 thresholds, mean of `--channels` channels per layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torchvision
from torch import Tensor, nn

from mpq_plugins.quantizers.uniform import mse_scales, quantize

BITS = tuple(range(2, 9))
Search = Callable[[Tensor], Mapping[int, Tensor]]


def hundred_thresholds(weight: Tensor) -> dict[int, Tensor]:
    """80 thresholds for all weights of a cache-sized part, then 20 around the best of each channel."""
    parts = weight.split(max(1, 2**16 * len(weight) // weight.numel()))
    return {bits: torch.cat([_hundred(part, bits) for part in parts]) for bits in BITS}


def _hundred(weight: Tensor, bits: int) -> Tensor:
    unit = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    best, error = unit.clone(), torch.full_like(unit, torch.inf)

    def attempt(scale: Tensor) -> None:
        found = (quantize(weight, scale, bits) * scale - weight).square().sum(dim=1, keepdim=True)
        better = found < error
        torch.where(better, scale, best, out=best)
        torch.where(better, found, error, out=error)

    for share in torch.linspace(1 / 80, 1, 80):
        attempt(unit * share)
    centre = best / unit
    for offset in torch.linspace(-0.95, 0.95, 20):
        attempt(unit * (centre + offset / 80).clamp(1e-3, 1))
    return best


def squared_error(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Squared error of each channel, in double precision."""
    weight, scale = weight.double(), scale.double()
    return (quantize(weight, scale, bits) * scale - weight).square().sum(dim=1)


def least_error(weight: Tensor, bits: int) -> Tensor:
    """Least squared error of each channel over 2,000 thresholds."""
    unit = weight.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
    errors = (squared_error(weight, unit * share, bits) for share in torch.linspace(1 / 2000, 1, 2000))
    least = next(errors)
    for error in errors:
        least = torch.minimum(least, error)
    return least


def weights_of(name: str, *, heavy: bool) -> list[Tensor]:
    """The weights of every convolution and linear layer, one row per output channel."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    rows = [layer.weight.detach().flatten(1) for layer in model.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    return [row / torch.randn_like(row).abs().clamp(min=0.1) for row in rows] if heavy else rows


def timed(search: Search, weights: Sequence[Tensor]) -> tuple[float, list[Mapping[int, Tensor]]]:
    """CPU seconds of this process for all layers, and their scales."""
    start = time.process_time()
    scales = [search(weight) for weight in weights]
    return time.process_time() - start, scales


def report(name: str, weights: Sequence[Tensor], n_channels: int) -> None:
    old_seconds, old = timed(hundred_thresholds, weights)
    new_seconds, new = timed(lambda weight: mse_scales(weight, BITS), weights)
    print(f"\n{name}: {old_seconds:.2f} s with 100 thresholds, {new_seconds:.2f} s now, ratio {old_seconds / new_seconds:.1f}")
    print("| bits | excess of 100 thresholds | excess now | channels worse by 1e-6 | most |")
    print("|---" * 5 + "|")
    for bits in BITS:
        errors = [
            (squared_error(weight, before[bits], bits), squared_error(weight, now[bits], bits))
            for weight, before, now in zip(weights, old, new, strict=True)
        ]
        change = torch.cat([now / before for before, now in errors]) - 1
        least = torch.cat([least_error(weight[:n_channels], bits) for weight in weights])
        before, now = (torch.cat([pair[which][:n_channels] for pair in errors]) / least - 1 for which in (0, 1))
        worse = int((change > 1e-6).sum())
        print(
            f"| {bits} | {before.mean():+.2e} | {now.mean():+.2e} | {worse} of {len(change)} | {change.max():+.1e} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--channels", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.models:
        for heavy in (False, True):
            report(f"{name}{', heavy-tailed' if heavy else ''}", weights_of(name, heavy=heavy), arguments.channels)


if __name__ == "__main__":
    main()
