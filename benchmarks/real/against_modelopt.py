"""NVIDIA ModelOpt's gradient score on EfficientNet-Lite0, with our images and menus, judged as our own scores are.

    python benchmarks/real/against_modelopt.py             # makes its environment, scores, judges, prints
    python benchmarks/real/against_modelopt.py --ours      # also the CPU seconds of our scores for each menu, in the same run

The environment has ModelOpt and what it needs; torch and the rest come from the environment that runs this script. ModelOpt is
asked for weights per output channel, activations in float, one menu at a time, nothing pinned, and no layer left in
float. Its loss is cross-entropy with labels drawn from the network's own predictions, as our `fisher` has it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import site
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

from fetch import cache_folder

VERSION = "0.47.0"
MENUS = {"2,4,8": (2, 4, 8), "2-6,8": (2, 3, 4, 5, 6, 8)}
OURS = ("kl-divergence", "clado fisher", "clado gram", "kl-divergence, 8 images", "clado fisher, 32 images")
RESULTS = Path(__file__).parent / "results"


def environment() -> Path:
    """The interpreter of ModelOpt's own environment, made at its first use."""
    folder = cache_folder() / f"modelopt-{VERSION}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        own = next((folder / "lib").glob("python*")) / "site-packages"
        (own / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        install = [str(python), "-m", "pip", "install", "--quiet", f"nvidia-modelopt=={VERSION}", "requests"]
        subprocess.run(install, check=True)
        (folder / "ready").touch()
    return python


def allocate(n_images: int, seed: int, ranges: str, averages: list[float]) -> dict:
    """ModelOpt's bits per layer for each menu and average, and its CPU seconds; runs inside its environment."""
    import modelopt.torch.quantization as mtq
    import torch
    from data import as_input, efficientnet
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.nn.modules.quant_conv import _QuantConv2d
    from photographs import pool

    images = as_input(pool("calibration", n_images, seed)).split(8)
    net = efficientnet()
    with torch.no_grad():
        torch.manual_seed(seed)
        labels = [torch.multinomial(net(part).softmax(-1), 1)[:, 0] for part in images]
    padded = {type(layer) for layer in net.modules() if isinstance(layer, torch.nn.Conv2d)} - {torch.nn.Conv2d}
    for kind in padded:
        QuantModuleRegistry.register({kind: kind.__name__})(_QuantConv2d)
    found = {}
    for menu, widths in MENUS.items():
        state = cache_folder() / f"modelopt-{ranges}-{menu}-{n_images}-{seed}.state"
        state.unlink(missing_ok=True)
        for average in averages:
            start = time.process_time()
            model, _ = mtq.auto_quantize(
                efficientnet(),
                constraints={"effective_bits": average},
                data_loader=list(zip(images, labels, strict=True)),
                forward_step=lambda model, batch: model(batch[0]),
                loss_func=lambda output, batch: torch.nn.functional.cross_entropy(output, batch[1]),
                num_calib_steps=len(images),
                num_score_steps=len(images),
                checkpoint=str(state),  # scored once, solved for each average
                module_search_spaces=[
                    {
                        "module_name_patterns": ["*"],
                        "quantization_formats": [weights_only(width, ranges) for width in widths],
                        "allow_no_quant": False,
                    }
                ],
                quantization_formats=[weights_only(width, ranges) for width in widths],
            )
            seconds = round(time.process_time() - start, 1)
            bits = {
                name: layer.weight_quantizer.num_bits
                for name, layer in model.named_modules()
                if getattr(layer, "weight_quantizer", None) is not None and layer.weight_quantizer.is_enabled
            }
            found[f"{menu}/{average:g}"] = {"bits": bits, "cpu_seconds": seconds}
            print(menu, average, seconds, len(bits), flush=True)
    return found


def weights_only(width: int, ranges: str) -> dict:
    """A format of ModelOpt: weights per output channel, everything else in float."""
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": width, "axis": 0}, "enable": True},
        ],
        "algorithm": ranges,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--ranges", choices=["max", "mse"], default="max", help="of weights while ModelOpt scores; max is its default"
    )
    parser.add_argument("--averages", nargs="+", type=float, default=[5, 4])
    parser.add_argument("--ours", action="store_true", help="time our scores too")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        found = allocate(options.images, options.seed, options.ranges, options.averages)
        options.inside.write_text(json.dumps(found))
        return
    part = cache_folder() / "modelopt-bits.json"
    own = [str(environment()), __file__, "--inside", str(part), *sys.argv[1:]]
    subprocess.run(own, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    judge(json.loads(part.read_text()), options)


def time_ours(case: Any, weights: Any, cells: Any, seed: int) -> None:
    """CPU seconds of our scores when they are asked for one menu alone."""
    import scores

    from mpq_plugins.common.allocator import keeping_memory

    images = [(inputs, None) for inputs in case.calibration]
    for (menu, widths), name in itertools.product(MENUS.items(), OURS):
        proxy = scores.proxy_of(name, case)
        key = f"{case.name}/{seed}/{menu}/free/{name}/score"
        start = time.process_time()
        with keeping_memory():
            proxy.score(case.net, scores.space_of(weights, widths, "free"), images)
        seconds = round(time.process_time() - start, 1)
        cells.found.pop(key, None)
        cells.get(key, lambda s=seconds, n=proxy.n_images: {"score_cpu_seconds": s, "n_images": n})


def judge(found: dict, options: argparse.Namespace) -> None:
    """Put the plans beside those of our own scores, in the same cells, and print their table."""
    sys.path.append(str(Path(__file__).resolve().parents[1]))  # for cells.py
    import scores
    from cells import Cells
    from data import load
    from weights import Weights

    cells = Cells(RESULTS / "scores-efficientnet_lite0.json")
    case = load("efficientnet_lite0", n_calibration=64, n_test=options.test, seed=options.seed)
    weights = Weights(case.net, case.example)
    name = "ModelOpt gradient" + ("" if options.ranges == "max" else f", {options.ranges}")
    for key, value in found.items():
        menu, average = key.split("/")
        start = f"{case.name}/{options.seed}/{menu}/free/{name}"
        cells.found.pop(f"{start}/{average}", None)
        facts = {
            "status": "optimal",
            "average": round(weights.average(value["bits"]), 3),
            "cpu_seconds_of_modelopt": value["cpu_seconds"],
        }
        cells.get(f"{start}/{average}", lambda v=value, f=facts: {**f, **scores.judge_plan(case, weights, v["bits"], {})})
    for menu in MENUS:  # the first average of a menu is the one that scored
        first = next(value for key, value in found.items() if key.startswith(f"{menu}/"))
        key = f"{case.name}/{options.seed}/{menu}/free/{name}/score"
        cells.found.pop(key, None)
        cells.get(key, lambda f=first: {"score_cpu_seconds": f["cpu_seconds"], "n_images": options.images})
    if options.ours:
        time_ours(case, weights, cells, options.seed)
    for table in scores.tables(cells, case.name, case.judge.main):
        print(f"\n{table}")


if __name__ == "__main__":
    main()
