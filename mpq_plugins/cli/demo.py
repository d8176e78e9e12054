"""The demo: a network in 8, 4 and mixed bits through both adapters, judged by the exported files, in one table."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from mpq_plugins.adapter.base import AbstractAdapter
from mpq_plugins.adapter.verify import verify
from mpq_plugins.allocation import Allocation, build_space, solve_scores
from mpq_plugins.cli.imagenet_demo import imagenet_network, labelled_images, photographs, shifted_images
from mpq_plugins.common.console import console as make_console
from mpq_plugins.common.files import write_json
from mpq_plugins.common.plugins import make
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.model.run import Batch, evaluating, labels_of
from mpq_plugins.reports import plot_allocation
from mpq_plugins.space.precision import menu
from mpq_plugins.space.space import Space

FORMAT = "mpq-demo/1"
# What OpenVINO's compact storage holds and Brevitas can do as well, so that one configuration serves both.
MENU = menu((2, 3, 4, 6, 8), (8,))
FILE_FORMAT = {"nncf": "OpenVINO", "brevitas": "QONNX"}
N_CALIBRATION, N_SCORED, N_SHIFTED, N_DIGITS = 32, 16, 2, 256
_MEGA = 1e6


@final
@dataclass(frozen=True)
class Plan:
    """One line of the table: which score decides, and the size it may use; None is the size of `UNIFORM`."""

    name: str
    stem: str
    proxy: str
    budget: str | None = None
    options: Mapping[str, int] = field(default_factory=dict)

    def allocate(self, net: nn.Module, space: Space, images: Sequence[Batch], size: float) -> Allocation:
        """The bits of every layer; `size` in bytes."""
        scores = make("proxies", self.proxy, self.options).score(net, space, images)
        return solve_scores(scores, {"size": self.budget or size})


UNIFORM = Plan("4 bits", "w4", "uniform", "w4")
MEASURED = Plan("mixed, measured", "mixed", "kl-divergence", options={"n_images": N_SCORED})
PLANS = (Plan("8 bits", "w8", "uniform", "w8"), UNIFORM, Plan("mixed, no data", "mixed-no-data", "constant"), MEASURED)


@final
@dataclass(frozen=True)
class Row:
    """One network: how large, how far from the float one, and whether its file holds the bits asked for.

    `weights_mb` counts weights at their bits, `file_mb` all bytes on disk. `kl` is the mean KL(float || this) in nats with its
    standard error, `agreement` the share of images with the float network's answer, `n_right` counts labelled images.
    """

    plan: str
    adapter: str | None
    average_bits: float
    weights_mb: float
    file_mb: float | None
    kl: float
    kl_error: float
    agreement: float
    n_right: int
    problems: tuple[str, ...] | None = None


@final
@dataclass(frozen=True)
class Images:
    """Images, labels of the first ones, which are as the network is meant to see them, and the float network's answers."""

    inputs: Tensor
    labels: Tensor
    expected: Tensor  # [image, class]

    @classmethod
    def of(cls, net: nn.Module, labelled: Batch, *others: Batch) -> Images:
        """Images with their labels, and others of which only the answers are compared."""
        inputs = torch.cat([labelled.inputs, *(batch.inputs for batch in others)])
        with evaluating(net):
            expected = torch.cat([net(part) for part in torch.split(inputs, len(labelled))])
        return cls(inputs, labels_of(labelled), expected)

    def judge(self, logits: Tensor) -> dict[str, Any]:
        """The figures of a `Row` that need answers [image, class]."""
        log_p, log_q = self.expected.double().log_softmax(1), logits.double().log_softmax(1)
        each = (log_p.exp() * (log_p - log_q)).sum(1)
        answers = logits.argmax(1)
        return {
            "kl": float(each.mean()),
            "kl_error": float(each.std()) / math.sqrt(len(each)),
            "agreement": float((answers == self.expected.argmax(1)).double().mean()),
            "n_right": int((answers[: len(self.labels)] == self.labels).sum()),
        }


def subject(network: str) -> tuple[nn.Module, Sequence[Batch], Images, str]:
    """A float network, images to calibrate on, images to judge by, and what these are."""
    if network == "digits":
        torch.set_num_threads(1)  # a tiny network: more threads only wait for each other, and on a busy machine they wait long
        small, images = trained_digits_net(), digits(train=True, batch_size=N_DIGITS)[:1]
        test = Images.of(small, digits(train=False, batch_size=N_DIGITS)[0])
        told = f"a residual network, trained on scikit-learn's digits; {N_DIGITS} to calibrate and to judge"
        return small, images, test, told
    net, images = imagenet_network(), photographs(N_CALIBRATION)
    told = f"EfficientNet-Lite0, trained on ImageNet; {N_CALIBRATION} crops of photographs to calibrate on, 20 labelled images"
    return net, images, Images.of(net, labelled_images(), shifted_images(N_SHIFTED)), told


def run_demo(folder: Path, network: str, *, adapters: Sequence[str], n_random: int, as_json: bool) -> int:
    """Run everything, leave all files in `folder`, print the table (or JSON), and return 1 if a file does not verify."""
    console = make_console(stderr=as_json)
    start = time.perf_counter()

    def tell(text: str) -> None:
        console.print(f"[{time.perf_counter() - start:4.0f} s] {text}")

    targets: dict[str, AbstractAdapter] = {name: make("adapters", name) for name in adapters}
    net, images, test, told = subject(network)
    tell(told)
    example, target = images[0].inputs[:1], next(iter(targets.values()), None)
    held, space = (build_space(net, example, choices=MENU, adapter=target, pin_first_last=is_held) for is_held in (True, False))
    size = 0.0
    n_weights = sum(layer.n_weights for layer in space.layers)
    rows = [Row("float", None, 32.0, n_weights * 4 / _MEGA, None, **test.judge(test.expected))]
    controls = (Plan(f"random {seed}", f"random-{seed}", "random", options={"seed": seed}) for seed in range(n_random))
    for plan in (*PLANS, *controls):
        if plan == MEASURED:
            tell(f"measuring each of {len(space.layers)} layers at 2, 3, 4, 6 and 8 bits on {N_SCORED} images")
        allocation = plan.allocate(net, held if plan.proxy == "uniform" else space, images, size)
        size = allocation.bits.costs["size"] if plan == UNIFORM else size
        allocation.bits.save(folder / f"{plan.stem}.bits.json")
        if plan == MEASURED:
            plot_allocation(allocation, folder / "bits.png")
        for adapter in targets.values():
            tell(f"{plan.name}: quantizing, exporting and verifying through {adapter.name}")
            rows.append(_row(plan, allocation, adapter, net, images, test, folder))
    document = {
        "format": FORMAT,
        "network": network,
        "rows": [{**asdict(row), "problems": list(row.problems or ())} for row in rows],
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_json(folder / "demo.json", document)
    if as_json:
        print(json.dumps(document, indent=2, sort_keys=True))
    else:
        console.print(demo_table(rows, len(test.inputs), len(test.labels)))
        for line in what_to_see(rows):
            console.print(line)
        tell(f"files in {folder}; which layer got which bits: {folder / 'bits.png'}")
    return 1 if any(row.problems for row in rows) else 0


def _row(
    plan: Plan,
    allocation: Allocation,
    adapter: AbstractAdapter,
    net: nn.Module,
    images: Sequence[Batch],
    test: Images,
    folder: Path,
) -> Row:
    """Quantize, export, verify, and judge the file."""
    example, bits = test.inputs[:1], allocation.bits
    module = adapter.prepare(net, bits, example, images)
    path = adapter.export(module, folder / f"{plan.stem}-{adapter.name}{adapter.suffix()}", example)
    report = verify(adapter, path, bits, module=module, inputs=test.inputs[:4], model=net)
    report.save(path.with_suffix(".verification.json"))
    return Row(
        plan.name,
        adapter.name,
        allocation.average_bits.overall,
        bits.costs["size"] / _MEGA,
        sum(part.stat().st_size for part in {path, path.with_suffix(".bin")} if part.exists()) / _MEGA,
        **test.judge(torch.from_numpy(adapter.run(path, test.inputs)[0])),
        problems=report.problems,
    )


def demo_table(rows: Iterable[Row], n_images: int, n_labelled: int) -> Table:
    """One line per network and file, in Markdown."""
    table = Table(box=box.MARKDOWN)
    table.add_column("weights")
    table.add_column("file")
    sizes, answers = ("bits per weight", "weights, MB", "file, MB"), ("distance (KL)", "answers as float")
    for heading in (*sizes, *answers, f"right of {n_labelled}", "verified"):
        table.add_column(heading, justify="right")
    for row in rows:
        is_float = row.adapter is None
        table.add_row(
            row.plan,
            FILE_FORMAT.get(row.adapter or "", row.adapter or "-"),
            f"{row.average_bits:.1f}",
            f"{row.weights_mb:.3g}",
            "-" if row.file_mb is None else f"{row.file_mb:.3g}",
            "-" if is_float else f"{row.kl:.3f} ± {row.kl_error:.3f}",
            "-" if is_float else f"{row.agreement:.0%} of {n_images}",
            str(row.n_right),
            "-" if row.problems is None else "NO" if row.problems else "yes",
        )
    return table


def what_to_see(rows: Sequence[Row]) -> list[str]:
    """What a stranger should take from the table, in its own figures."""
    lines = []
    for adapter in dict.fromkeys(row.adapter for row in rows if row.adapter):
        by_plan: Mapping[str, Row] = {row.plan: row for row in rows if row.adapter == adapter}
        uniform, mixed = by_plan["4 bits"], by_plan["mixed, measured"]
        lines.append(
            f"{FILE_FORMAT.get(adapter, adapter)}: {uniform.weights_mb:.3g} MB of weights are {uniform.kl:.3f} from the float "
            f"network with 4 bits in all layers between, {mixed.kl:.3f} with mixed bits."
        )
    lines.append(
        "In the rows of 8 and 4 bits the first and the last layer have 8, as is usual; the mixed rows decide about them too, "
        "at the size of the 4-bit row. Activations have 8 bits. All figures are of the exported files, distance and answers "
        "over all test images; verified: bits and weight codes were read back from the file."
    )
    if any(row.adapter == "brevitas" for row in rows):
        lines.append("QONNX keeps codes of any width as floats: its file shrinks when a compiler such as FINN packs them.")
    return lines
