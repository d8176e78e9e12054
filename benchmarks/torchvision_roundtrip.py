"""ResNet-18, ResNet-50 and MobileNetV2 at 224x224: allocate, both adapters, export, read back, compare.

    python benchmarks/torchvision_roundtrip.py [--models resnet18] [--routes nncf brevitas finn] [--activations]

Weights 2..8 are mixed by an OMPQ allocation at the size of uniform 4 bits; `--activations` mixes activation bits 4..8 too.
Weights are random (no downloads), so accuracy means nothing here: bits and every weight code are compared exactly, and
outputs as `mpq verify` does. Exits with 1 if anything differs.
"""

import argparse
import itertools
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision

import mpq_plugins as mpq
from mpq_plugins.common.plugins import make
from mpq_plugins.training import reestimate_batch_norm

ROUTES = {
    "nncf": ("nncf", {}, "openvino-compact", ".xml"),
    "nncf-fast": ("nncf", {}, "openvino-fast", ".xml"),
    "brevitas": ("brevitas", {}, "qonnx", ".onnx"),
    "finn": ("brevitas", {"profile": "finn"}, "qonnx", ".onnx"),
}


def network(name):
    """The torchvision network with random weights whose batch normalisation fits the data, as a trained one's does."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    reestimate_batch_norm(model, images(16, seed=1).split(8))
    return model


def images(n, seed):
    """Smooth random images [n, 3, 224, 224]."""
    coarse = torch.randn(n, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bilinear")


def round_trip(name, route, *, activations, folder):
    """One row: what was asked, what was found, seconds of each stage."""
    adapter_name, options, file_format, suffix = ROUTES[route]
    adapter, model = make("adapters", adapter_name, options), network(name)
    calibration, test = images(8, seed=2).split(4), images(8, seed=3)
    budgets = {"size": "w4", "bops": "w4a6"} if activations else {"size": "w4"}
    clock = [time.perf_counter()]
    allocation = mpq.allocate(
        model,
        test[:1],
        images(32, seed=4).split(16),
        proxy="ompq",
        budgets=budgets,
        choices=mpq.menu(range(2, 9), range(4, 9) if activations else (8,)),
        adapter=adapter,
    )
    clock.append(time.perf_counter())
    module = adapter.prepare(model, allocation.bits, test[:1], calibration)
    clock.append(time.perf_counter())
    path = adapter.export(module, folder / f"{name}-{route}{suffix}", test[:1], format=file_format)
    clock.append(time.perf_counter())
    report = mpq.verify(adapter, path, allocation.bits, module=module, inputs=test, model=model)
    clock.append(time.perf_counter())
    seconds = [later - earlier for earlier, later in itertools.pairwise(clock)]
    return allocation, report, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--routes", nargs="+", default=list(ROUTES), choices=list(ROUTES))
    parser.add_argument("--activations", action="store_true")
    arguments = parser.parse_args()
    print(
        "| network | route | layers | codes equal | output difference (std) | budgets | s: allocate, prepare, export, verify |"
    )
    print("|---|---|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            for route in arguments.routes:
                allocation, report, seconds = round_trip(name, route, activations=arguments.activations, folder=Path(folder))
                n_codes = sum(check.n_codes for check in report.layers)
                n_different = sum(check.n_different for check in report.layers)
                kept = ", ".join(f"{check.name} {check.found / check.limit:.2%}" for check in report.budgets)
                stages = " / ".join(f"{second:.0f}" for second in seconds)
                print(
                    f"| {name} | {route} | {sum(check.ok for check in report.layers)}/{len(allocation.bits.layers)} "
                    f"| {n_codes - n_different:,}/{n_codes:,} | {report.outputs.mean_relative:.1e} | {kept} | {stages} |",
                    flush=True,
                )
                failed = failed or not report.ok
                for problem in report.problems:
                    print(f"  {problem}", file=sys.stderr)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
