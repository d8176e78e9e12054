"""What `prepare` costs beside the framework's own quantization of the same network with the same images.

    OMP_NUM_THREADS=1 python benchmarks/real/prepare_time.py            # EfficientNet-Lite0, 128 images, w8a8 in all layers
    OMP_NUM_THREADS=1 python benchmarks/real/prepare_time.py --tiny     # the whole path on a tiny network, no download

Its own quantization is `nncf.quantize` with its defaults, which correct biases; for Brevitas calibration and bias correction
(`calibration_mode`, `bias_correction_mode`) of the same layers in the same formats. CPU seconds of one process, the least of
`--rounds` in turns: on a machine with other work their ratio is what counts.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for cells.py

# isort: split

import torch
from data import Case, batches, efficientnet_lite0
from fetch import FetchError
from judge import called
from standins import tiny_cnn
from torch import nn

from mpq_plugins import Precision, find_layers
from mpq_plugins.common.plugins import make
from mpq_plugins.space.bits import BitConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny network made in code")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--adapters", nargs="+", default=list(OWN), choices=list(OWN))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        case = (tiny_cnn if options.tiny else efficientnet_lite0)(options.images, 8, 0)
    except FetchError as error:
        sys.exit(str(error))
    images = batches(torch.cat(case.calibration), options.batch)
    lines = [f"{case.name}: CPU s, {options.images} images in batches of {options.batch}, {options.bits} in all layers", ""]
    lines += ["| framework | its own quantization | prepare | ratio |", "|---" * 4 + "|"]
    for name in options.adapters:
        own, ours = times(case, name, images, options.bits, options.rounds)
        lines.append(f"| {name} | {own:.1f} | {ours:.1f} | {ours / max(own, 1e-9):.2f} |")
    print("\n".join(lines))


def times(case: Case, name: str, images: tuple[Any, ...], width: str, n_rounds: int) -> tuple[float, float]:
    """CPU seconds of the framework's own quantization and of `prepare`."""
    inventory = find_layers(case.net, case.example)
    bits = BitConfig({layer.name: Precision.parse(width) for layer in inventory}, inventory.fingerprint)
    adapter = make("adapters", name)
    # What a process pays once, such as imports, is neither's.
    once = tiny_cnn(8, 8, 0)
    layers = find_layers(once.net, once.example)
    adapter.prepare(
        once.net,
        BitConfig(dict.fromkeys((layer.name for layer in layers), Precision(8, 8)), layers.fingerprint),
        once.example,
        [once.calibration[0]],
    )
    given = [(inputs, None) for inputs in images]
    own, ours = [], []
    for _ in range(n_rounds):
        own.append(OWN[name](case.net, bits, images))
        ours.append(seconds(lambda: adapter.prepare(case.net, bits, case.example, given)))
    return min(own), min(ours)


def seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of a piece of work."""
    start = time.process_time()
    work()
    return time.process_time() - start


def by_nncf(net: nn.Module, bits: BitConfig, images: tuple[Any, ...]) -> float:
    """NNCF's own quantization, at 8 bits whatever was asked."""
    import nncf
    from mpq_nncf.nncf_setup import as_hookable

    return seconds(lambda: nncf.quantize(as_hookable(net), nncf.Dataset(list(images)), subset_size=len(images)))


def by_brevitas(net: nn.Module, bits: BitConfig, images: tuple[Any, ...]) -> float:
    """Calibration, weight ranges and bias correction of Brevitas, on the layers that the adapter puts in place."""
    from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
    from mpq_brevitas.convert import convert
    from mpq_brevitas.options import BrevitasOptions

    module = convert(net, bits, BrevitasOptions(signed=dict.fromkeys(bits.layers, True))).module

    def quantize() -> None:
        with torch.no_grad():
            with calibration_mode(module):
                for inputs in images:
                    called(module, inputs)
            module.eval()
            called(module, images[0])
            with bias_correction_mode(module):
                for inputs in images:
                    called(module, inputs)

    return seconds(quantize)


OWN = {"nncf": by_nncf, "brevitas": by_brevitas}


if __name__ == "__main__":
    main()
