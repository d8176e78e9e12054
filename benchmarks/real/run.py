"""The bench on real pretrained networks: measures what results/ lacks, then prints the tables.

    python benchmarks/real/fetch.py                                       # once: networks and photographs
    python benchmarks/real/run.py scores --networks efficientnet_lite0    # hours for everything; goes on where it stopped
    python benchmarks/real/run.py batch-norm
    python benchmarks/real/run.py adapters
    python benchmarks/real/run.py joint methods top-k                     # both kinds of bits; options of `prepare`; top_k
    python benchmarks/real/run.py --print-only                            # the tables of what was measured
    python benchmarks/real/run.py --tiny                                  # the whole path on two tiny networks, no download

Weights are quantized per output channel at the step of least squared error. CPU seconds are of one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for cells.py

# isort: split

import batch_norm
import joint
import methods
import scores
import top_k
from cells import Cells
from data import NETWORKS
from fetch import FetchError, cache_folder
from standins import STANDINS

import adapters
from mpq_plugins.common.allocator import keeping_memory

PARTS = ("scores", "batch-norm", "adapters", "joint", "methods", "top-k")
RESULTS = Path(__file__).parent / "results"
MAIN = {
    "efficientnet_lite0": "kl",
    "crnn": "cer",
    "minilm": "distance",
    "digits": "kl",
    "tiny_cnn": "kl",
    "tiny_mixer": "distance",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without one")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--print-only", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="two tiny networks made in code; results are not kept")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the calibration inputs")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--scores", nargs="+", default=list(scores.SCORES), choices=list(scores.SCORES))
    parser.add_argument("--menus", nargs="+", default=list(scores.MENUS), choices=list(scores.MENUS))
    parser.add_argument("--pins", nargs="+", default=list(scores.PINS), choices=list(scores.PINS))
    parser.add_argument("--averages", nargs="+", type=float, default=list(scores.AVERAGES))
    parser.add_argument("--adapters", nargs="+", default=["nncf", "brevitas"])
    parser.add_argument("--bits", nargs="+", default=list(adapters.BITS))
    parser.add_argument("--methods", nargs="+", default=list(methods.METHODS), choices=list(methods.METHODS))
    parser.add_argument("--again", nargs="+", default=[], help="scores, adapters or methods to measure anew")
    options = parser.parse_args()
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    parts = options.parts or list(PARTS)
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            options.results, options.calibration, options.test = Path(folder), 32, 64
            options.averages, options.bits = [4.0, 2.5], ["w4a8"]
            options.methods = ["default", "batch_norm=kept", "equalization=cross-layer", "rounding=gptq"]
            with keeping_memory():
                run(options, parts, STANDINS, Path(folder))
        return
    try:
        with keeping_memory():
            run(options, parts, {name: NETWORKS[name] for name in options.networks}, cache_folder())
    except FetchError as error:
        sys.exit(str(error))


def run(options: argparse.Namespace, parts: list[str], networks: dict, kept: Path) -> None:
    """Measure the parts, then print their tables."""
    options.results.mkdir(parents=True, exist_ok=True)
    for name, make in networks.items():
        cells = {part: Cells(options.results / f"{part}-{name}.json") for part in parts}
        for part in parts:
            forget(cells[part], kept / "scores", options.again)
        for seed in [] if options.print_only else options.seeds:
            case = make(options.calibration, options.test, seed)
            if "scores" in parts:
                scores.measure(
                    case,
                    cells["scores"],
                    kept / "scores",
                    seed=seed,
                    names=options.scores,
                    menus=options.menus,
                    pins=options.pins,
                    averages=options.averages,
                )
            if "batch-norm" in parts:
                batch_norm.measure(case, cells["batch-norm"], seed=seed)
            if "adapters" in parts:
                adapters.measure(case, cells["adapters"], seed=seed, names=options.adapters, widths=options.bits)
            if "joint" in parts:
                names = joint.STANDIN_SCORES if options.tiny else options.scores
                joint.measure(case, cells["joint"], kept / "measurements", seed=seed, names=names)
            if "methods" in parts:
                methods.measure(
                    case, cells["methods"], kept / "scores", seed=seed, names=options.adapters, methods=options.methods
                )
            if "top-k" in parts:
                known = scores.judged_plans(case, Cells(options.results / f"scores-{name}.json"), seed)
                asked = {"names": options.scores, "averages": options.averages}
                top_k.measure(case, cells["top-k"], kept / "scores", seed=seed, judged=known, **asked)
        options.again = options.again if name != list(networks)[-1] else []
        tables = {
            "scores": scores.tables,
            "batch-norm": batch_norm.tables,
            "adapters": adapters.tables,
            "joint": joint.tables,
            "methods": methods.tables,
            "top-k": top_k.tables,
        }
        for part in parts:
            for table in tables[part](cells[part], name, MAIN[name]):
                print(f"\n{table}")


def forget(cells: Cells, folder: Path, names: list[str]) -> None:
    """Drop cells and kept scores of `names`."""
    for key in [key for key in cells.found if set(key.split("/")) & set(names)]:
        del cells.found[key]
    for name in names:
        for path in folder.glob(f"*_{name.replace(' ', '-')}.scores.json"):
            path.unlink()


if __name__ == "__main__":
    main()
