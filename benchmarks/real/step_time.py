"""Time of a training step: float, and quantized through both adapters.

    python benchmarks/real/step_time.py --device cuda --batch 16 64     # EfficientNet-Lite0 at 224 pixels, w4a4
    python benchmarks/real/step_time.py --tiny

The median of `--steps` steps after five to warm up: forward, backward and optimizer. Only ratios within one run mean anything.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from data import as_input, efficientnet
from photographs import pool
from standins import tiny_cnn
from torch import Tensor, nn

from mpq_plugins import find_layers, first_and_last
from mpq_plugins.common.plugins import make
from mpq_plugins.space.bits import BitConfig

_WARM = 5


def step(module: nn.Module, images: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One step towards the module's own first class."""
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(module(images), torch.zeros(len(images), dtype=torch.long, device=images.device)).backward()
    optimizer.step()


def milliseconds(module: nn.Module, images: Tensor, n_steps: int) -> float:
    """The median time of a step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-5)
    found = []
    for i in range(_WARM + n_steps):
        start = time.perf_counter()
        step(module.train(), images, optimizer)
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        if i >= _WARM:
            found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--adapters", nargs="*", default=["brevitas", "nncf"])
    parser.add_argument("--tiny", action="store_true", help="a tiny network made in code")
    options = parser.parse_args()
    if options.tiny:
        case = tiny_cnn(64, 1, 0)
        net, images = case.net, torch.cat(list(case.calibration))
    else:
        net, images = efficientnet(), as_input(pool("calibration", 64, 0))
    net, images = net.to(options.device), images.to(options.device)
    inventory = find_layers(net, images[:1])
    pins = first_and_last(inventory)
    bits = BitConfig({layer.name: str(pins.get(layer.name, "w4a4")) for layer in inventory}, inventory.fingerprint)
    made: dict[str, Callable[[], Any]] = {"float": lambda: net}
    for name in options.adapters:
        made[name] = lambda name=name: make("adapters", name).prepare(net, bits, images[:1], [(images[:16], None)])
    print("| module | " + " | ".join(f"batch {size}: ms (of float)" for size in options.batch) + " |")
    print("|---" * (1 + len(options.batch)) + "|", flush=True)
    base: dict[int, float] = {}
    for name, module_of in made.items():
        module, cells = module_of(), []
        for size in options.batch:
            ms = milliseconds(module, images.repeat(-(-size // len(images)), 1, 1, 1)[:size], options.steps)
            cells.append(f"{ms:.1f} ({ms / base.setdefault(size, ms):.1f}x)")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
