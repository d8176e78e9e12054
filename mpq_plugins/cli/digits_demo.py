"""The small demo: train on digits, allocate, apply, export and verify through both adapters, print one table."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mpq_plugins.adapter.base import AbstractAdapter
from mpq_plugins.adapter.verify import Verification, verify
from mpq_plugins.allocation import Allocation, build_space
from mpq_plugins.cli.digits import digits, trained_digits_net
from mpq_plugins.common.console import console as make_console
from mpq_plugins.common.plugins import make
from mpq_plugins.common.tensor_files import write_torch
from mpq_plugins.reports import (
    CONTROLS,
    compare,
    comparison_table,
    plot_allocation,
    plot_comparison,
)
from mpq_plugins.space.precision import menu

BUDGETS = {"size = uniform w3": {"size": "w3"}, "size = uniform w2.5": {"size": "w2.5"}}
PROXIES = ("ompq", "csmpq", "clado")
# What OpenVINO's compact storage holds and Brevitas can do as well, so that one configuration serves both.
MENU = menu((2, 3, 4, 6, 8), (8,))


@dataclass
class _Folder:
    """Keeps what the scores (not the controls) give: bits, plots, artifacts, verification reports."""

    path: Path
    net: nn.Module
    inputs: Tensor
    reports: list[Verification] = field(default_factory=list)

    def keep(self, budget: str, proxy: str, allocation: Allocation, adapter: AbstractAdapter, module: nn.Module) -> None:
        if proxy.split("#")[0] in CONTROLS:
            return
        stem = f"{proxy}-{budget.split()[-1]}"
        allocation.bits.save(self.path / f"{stem}.bits.json")
        plot_allocation(allocation, self.path / f"{stem}.png")
        name = f"{stem}-{adapter.name}"
        artifact = adapter.export(module, self.path / f"{name}{adapter.suffix()}", self.inputs[:1])
        report = verify(adapter, artifact, allocation.bits, module=module, inputs=self.inputs, model=self.net)
        report.save(self.path / f"{name}.verification.json")
        self.reports.append(report)


def run_digits_demo(folder: Path, *, n_seeds: int, adapters: Sequence[str], as_json: bool) -> int:
    """Run everything, leave all files in `folder`, print the table (or JSON), and return 1 if a file does not verify."""
    start = time.perf_counter()
    # The network is tiny: more threads only wait for each other, and on a busy machine they wait long.
    torch.set_num_threads(1)
    console = make_console(stderr=as_json)
    targets: dict[str, AbstractAdapter] = {name: make("adapters", name) for name in adapters}
    console.print("training a residual network of 14 layers on scikit-learn's digits")
    net = trained_digits_net()
    write_torch(folder / "float.pt", net.state_dict())
    # Few large batches: a fake-quantized module quantizes its weights anew in every forward pass.
    calibration, test = digits(train=True, batch_size=256)[:1], digits(train=False, batch_size=300)
    example = test[0].inputs[:1]
    kept = _Folder(folder, net, test[0].inputs)
    console.print(f"scoring, solving and applying through {', '.join(targets)}: a minute or two")
    comparison = compare(
        net,
        build_space(net, example, choices=MENU, adapter=next(iter(targets.values()), None), pin_first_last=True),
        example=example,
        calibration=calibration,
        test=test,
        budgets=BUDGETS,
        adapters=targets,
        proxies=PROXIES,
        n_seeds=n_seeds,
        on_applied=kept.keep,
    )
    comparison.save(folder / "comparison.json")
    plot_comparison(comparison, folder / "comparison.png")
    if as_json:
        verified = {Path(report.artifact).name: report.ok for report in kept.reports}
        print(json.dumps({**comparison.to_json(), "verified": verified}, indent=2, sort_keys=True))
    else:
        console.print(comparison_table(comparison))
        for report in kept.reports:
            console.print(_line(report))
        console.print(f"files in {folder}, {time.perf_counter() - start:.0f} s")
    return 0 if all(report.ok for report in kept.reports) else 1


def _line(report: Verification) -> str:
    n_codes = sum(check.n_codes or 0 for check in report.layers)
    outputs = "" if report.outputs is None else f", outputs within {report.outputs.mean_relative:.0e} std"
    if report.ok:
        return f"verified {Path(report.artifact).name}: {len(report.layers)} layers, {n_codes:,} weight codes equal{outputs}"
    return f"FAILED {Path(report.artifact).name}: " + "; ".join(report.problems[:3])
