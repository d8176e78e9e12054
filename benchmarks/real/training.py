"""What training gives back of a real network at few bits: distilled from its own float network on photographs, no labels.

    python benchmarks/real/fetch.py                   # once: network and photographs
    python benchmarks/real/training.py                # measures what results/ lacks, then prints the table
    python benchmarks/real/training.py --print-only
    python benchmarks/real/training.py --tiny         # the whole path on a tiny network, no download
    python benchmarks/real/training.py --pixels 224 --steps 640 --device cuda   # where there is a GPU

EfficientNet-Lite0 on crops of 96 pixels out of photographs of 160 (or of 224 out of 256), through Brevitas. The float
network at that size is teacher and reference. All methods get the same number of steps, batches and learning rate; a seed
draws the crops. "PTQ" is `prepare` alone, on 64 images (training starts from one on 32); "DuQ" is PROFIT's own quantizer.
First and last layer are at w8a8; "mixed" has the size and the bit operations of w3a4.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for cells.py

# isort: split

import torch
import torch.nn.functional as F
from cells import Cells
from data import Case, as_input, batches, efficientnet
from fetch import FetchError
from judge import Classes
from photographs import imagenet_images, pool
from standins import tiny_cnn
from torch import Tensor

import mpq_plugins as mpq
from mpq_plugins.common.plugins import make
from mpq_plugins.model.run import Batch
from mpq_plugins.proxies import KLDivergence
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.training import ProfitSchedule, TrainingRecipe, soft_cross_entropy, train

RESULTS = Path(__file__).parent / "results"
METHODS = ("PTQ", "QAT", "PROFIT", "PROFIT + DuQ")
MORE = ("PTQ + DuQ", "QAT + DuQ", "QAT, batch statistics", "PROFIT, one cosine")
BITS = ("w4a4", "w3a3", "mixed")
WEIGHTS, ACTIVATIONS = (2, 3, 4, 6), (3, 4, 6)  # of the mixed configuration
SCALED = {96: 160, 224: 256}  # pixels: the side of a photograph by the side of the crops out of it
_BATCH = 16
_N_CALIBRATION, _N_START, _N_SCORED = 64, 32, 8  # images of PTQ, before training, and of the score
_N_EPOCHS = 8  # as many as PROFIT has stages here, and one more
_RECIPE = TrainingRecipe(
    epochs=_N_EPOCHS,
    learning_rate=0.01,
    range_factor=0.1,
    clip_norm=1.0,  # gradients of a network that quantization broke are a hundred times that
    batch_norm="corrected",  # 16 photographs say little of the statistics of ImageNet
    profit=ProfitSchedule(widths=(5,), float_epochs=0),
)


@dataclass(frozen=True, eq=False)
class Ground:
    """A case, and the larger images that training crops its own from."""

    case: Case
    images: Tensor  # [N, channels, height, width]
    side: int
    device: str = "cpu"

    @lru_cache(maxsize=2 * _N_EPOCHS)  # noqa: B019  # all methods see the same crops, and a ground lives as long as the script
    @torch.no_grad()
    def crops(self, seed: int, n_batches: int, epoch: int) -> tuple[tuple[Tensor, Tensor], ...]:
        """Random crops of random images, half of them mirrored, and the logits of the float network for them."""
        random = torch.Generator().manual_seed(1000 * seed + epoch)
        size = min(_BATCH, len(self.images))
        draws = [torch.randperm(len(self.images), generator=random)[:size] for _ in range(n_batches)]
        made = (self._batch(draw, random).to(self.device) for draw in draws)
        return tuple((crops, self.case.net(crops)) for crops in made)

    def _batch(self, chosen: Tensor, random: torch.Generator) -> Tensor:
        return torch.stack([self._crop(self.images[i], random) for i in chosen])

    def _crop(self, image: Tensor, random: torch.Generator) -> Tensor:
        most = image.shape[-1] - self.side
        top, left, is_mirrored = (int(torch.randint(n, (1,), generator=random)) for n in (most + 1, most + 1, 2))
        part = image[:, top : top + self.side, left : left + self.side]
        return part.flip(-1) if is_mirrored else part


def photographs(n_train: int, n_test: int, side: int, device: str) -> Ground:
    """EfficientNet-Lite0 at `side` pixels; tested on the middle of the image, or on all of it at 224 pixels."""
    net = efficientnet().to(device)
    images = scaled(as_input(pool("calibration", n_train, 0)), SCALED[side])

    def middle(images: Tensor) -> Tensor:
        images = images if images.shape[-1] == side else scaled(images, SCALED[side])
        start = (images.shape[-1] - side) // 2
        return images[..., start : start + side, start : start + side].contiguous().to(device)

    test = batches(middle(as_input(pool("test", n_test, 0))), _BATCH)
    labelled, labels = imagenet_images()
    judge = Classes(net, test, middle(as_input(labelled)), torch.from_numpy(labels).to(device))
    calibration = batches(middle(as_input(pool("calibration", _N_CALIBRATION, 0))), _BATCH)
    name = "efficientnet_lite0" + ("" if side == min(SCALED) else f"-{side}")
    return Ground(Case(name, net, calibration, test, judge), images, side, device)


def stand_in(n_train: int, n_test: int, side: int, device: str) -> Ground:
    """A tiny network on images made in code."""
    case = tiny_cnn(n_train, n_test, 0)
    return Ground(case, torch.cat(list(case.calibration)), 12)


def scaled(images: Tensor, side: int) -> Tensor:
    """To `side` x `side` pixels, bicubic."""
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True)


def bits_of(ground: Ground, text: str, folder: Path) -> BitConfig:
    """`w4a4` for every layer but the first and the last, or `mixed`, which is kept in `folder`."""
    case, path = ground.case, folder / f"training-{ground.case.name}-{text}.bits.json"
    inventory = mpq.find_layers(case.net, case.example)
    if text != "mixed":
        pins = mpq.first_and_last(inventory)
        layers = {layer.name: mpq.Precision.parse(str(pins.get(layer.name, text))) for layer in inventory}
        return BitConfig(layers, inventory.fingerprint)
    if not path.exists():
        allocation = mpq.allocate(
            case.net,
            case.example,
            [(inputs, None) for inputs in case.calibration],
            proxy=KLDivergence(n_images=_N_SCORED),
            budgets={"size": "w3", "bops": "w3a4"},
            choices=mpq.menu(WEIGHTS, ACTIVATIONS),
            adapter=make("adapters", "brevitas", {}),
            pin_first_last=True,
        )
        allocation.bits.save(path)
    return BitConfig.load(path)


def cell(ground: Ground, bits: BitConfig, method: str, seed: int, n_steps: int) -> dict[str, Any]:
    """Figures after one way to get to the bits, and the losses on the way."""
    case = ground.case
    adapter = make("adapters", "brevitas", {"quantizer": "duq"} if "DuQ" in method else {})
    calibration = [(inputs, None) for inputs in case.calibration]
    start = calibration[: _N_START // len(case.calibration[0])]
    if method.startswith("PTQ"):
        return {"figures": case.judge.of(adapter.prepare(case.net, bits, case.example, calibration))}
    start_s = time.perf_counter()
    trained = train(
        case.net,
        bits,
        partial(ground.crops, seed, n_steps // _N_EPOCHS),
        adapter=adapter,
        recipe=recipe_of(method, seed),
        example=case.example,
        calibration=start,
        loss=distillation,
    )
    seconds = round(time.perf_counter() - start_s, 1)
    curve = [[record.stage, round(record.loss, 4)] for record in trained.history]
    return {"figures": case.judge.of(trained.module), "steps": trained.history[-1].steps, "curve": curve, "seconds": seconds}


def distillation(result: Tensor, batch: Batch) -> Tensor:
    """As with `teacher=`, whose answers are here made once for all methods."""
    assert batch.labels is not None  # the float network's logits
    return soft_cross_entropy(result, batch.labels)


def recipe_of(method: str, seed: int) -> TrainingRecipe:
    """The recipe of a method; all share rate, decay and number of steps."""
    recipe = replace(_RECIPE, seed=seed, batch_norm="kept" if "batch statistics" in method else _RECIPE.batch_norm)
    if method.startswith("PROFIT"):
        return replace(recipe, method="profit", restarts="one cosine" not in method)
    return recipe


def measure(ground: Ground, cells: Cells, options: argparse.Namespace) -> None:
    """Fill the cells that are missing."""
    name = ground.case.name
    cells.get(f"{name}/float", lambda: {"figures": ground.case.judge.of(ground.case.net)})
    cells.get(f"{name}/undecided", lambda: {"figures": undecided(ground.case)})
    for seed in range(options.first_seed, options.seeds):
        for text in options.bits:
            bits = bits_of(ground, text, options.results)
            for method in options.methods:
                if seed and method.startswith("PTQ"):
                    continue
                key = f"{name}/{text}/{method}/{seed}"
                cells.get(key, partial(cell, ground, bits, method, seed, options.steps))


@torch.no_grad()
def undecided(case: Case) -> dict[str, float]:
    """Figures of an answer that holds all classes for equally likely."""
    logits = torch.zeros_like(case.net(case.example))
    return case.judge.figures(lambda inputs: logits.expand(len(inputs), -1))


def table(cells: Cells, name: str) -> str:
    """Markdown: a row per bits, a column per method; KL, agreement in percent, right of the labelled images."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, value in cells.found.items():
        if key.startswith(f"{name}/") and key.count("/") == 3:
            _, text, method, _ = key.split("/")
            found.setdefault((text, method), []).append(value)
    methods = [method for method in (*METHODS, *MORE) if any(own == method for _, own in found)]
    lines = [f"{name}: KL to float, agreement in percent, right of the labelled images", ""]
    lines += ["| bits | " + " | ".join(methods) + " |", "|---" * (1 + len(methods)) + "|"]
    for text in (own for own in BITS if any(bits == own for bits, _ in found)):
        lines.append(f"| {text} | " + " | ".join(_shown(found.get((text, method), [])) for method in methods) + " |")
    steps = sorted({value["steps"] for own in found.values() for value in own if "steps" in value})
    reference, control = (_shown([cells.found[f"{name}/{own}"]]) for own in ("float", "undecided"))
    seeds = "; ".join(f"{text} {max(len(found.get((text, method), [])) for method in methods)}" for text in BITS)
    lines += ["", f"float: {reference}; all classes equally likely: {control}"]
    return "\n".join([*lines, f"steps: {', '.join(map(str, steps))}; seeds: {seeds}"])


def _shown(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "-"

    def of(name: str, factor: float, digits: int) -> str:
        values = [factor * value["figures"][name] for value in found]
        spread = f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    right = statistics.mean(value["figures"]["right"] for value in found)
    return f"{of('kl', 1, 2)}; {of('agreement', 100, 0)}; {right:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--bits", nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=(*METHODS, *MORE))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=64, help=f"of each run, a multiple of {_N_EPOCHS}")
    parser.add_argument("--train", type=int, default=512, help="photographs to train on")
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--pixels", type=int, default=min(SCALED), choices=list(SCALED), help="side of the crops")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--print-only", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a tiny network made in code; results are not kept")
    options = parser.parse_args()
    if options.steps < 2 * _N_EPOCHS or options.steps % _N_EPOCHS:  # AIWQ is measured between two steps
        parser.error(f"--steps must be a multiple of {_N_EPOCHS} from {2 * _N_EPOCHS} on, not {options.steps}")
    torch.set_num_threads(1)
    if options.tiny:
        with tempfile.TemporaryDirectory() as folder:
            options.results, options.steps, options.train, options.test, options.seeds = Path(folder), 2 * _N_EPOCHS, 32, 64, 1
            run(options, "tiny_cnn", stand_in)
        return
    try:
        run(options, "efficientnet_lite0" + ("" if options.pixels == min(SCALED) else f"-{options.pixels}"), photographs)
    except FetchError as error:
        sys.exit(str(error))


def run(options: argparse.Namespace, name: str, ground: Callable[[int, int, int, str], Ground]) -> None:
    """Measure, then print the table."""
    options.results.mkdir(parents=True, exist_ok=True)
    cells = Cells(options.results / f"training-{name}.json")
    if not options.print_only:
        measure(ground(options.train, options.test, options.pixels, options.device), cells, options)
    print(f"\n{table(cells, name)}")


if __name__ == "__main__":
    main()
