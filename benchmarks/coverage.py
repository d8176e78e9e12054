"""Which models go through: layers, allocation, quantization, export and verification of each with each adapter.

    python benchmarks/coverage.py [--groups timm ...] [--models resnet18 ...] [--adapters nncf brevitas] [--again]
    python benchmarks/coverage.py --print-only > docs/coverage.md

Each pair runs in a process of its own, under a time limit; a crash is a row like any other. Weights are random (no
downloads), batch normalisation fits the data. Results are kept after each pair, and a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, Cells
from coverage_models import SUBJECTS, Subject
from torch import nn

import mpq_plugins as mpq
from mpq_plugins.common.plugins import make
from mpq_plugins.errors import MPQError
from mpq_plugins.model.layers import Layer, Skipped, distinct_weights
from mpq_plugins.model.left_in_float import LeftInFloat
from mpq_plugins.training import reestimate_batch_norm

ADAPTERS = {"nncf": ("OpenVINO IR", ".xml"), "brevitas": ("QONNX", ".onnx")}
TITLES = {"nncf": "NNCF", "brevitas": "Brevitas"}
OUTCOMES = ("verified", "one batch size", "refused", "differs", "raw error", "crash", "time limit")
_TEST, _CALIBRATION = 3, (4, 4)  # images to verify on, then one of them; images of each calibration batch
_LONGEST = 400


def attempt(subject: Subject, adapter_name: str, folder: Path, tell: Callable[[str], None] = lambda stage: None) -> dict:
    """What becomes of one pair: how far it went, what was quantized, and why the rest was not."""
    stage, row = "build", {}

    def at(name: str) -> None:
        nonlocal stage
        stage = name
        tell(name)

    try:
        at("build")
        torch.manual_seed(0)
        model = _trained_looking(subject.build().eval())
        with contextlib.suppress(Exception):  # half precision and the like
            reestimate_batch_norm(model, [subject.inputs(8, seed) for seed in (10, 20)])
        adapter, example = make("adapters", adapter_name, {}), subject.inputs(1, 0)
        at("layers")
        found = mpq.find_layers(model, example)
        row |= _account(model, found, found.layers, found.skipped)
        at("allocate")
        allocation = mpq.allocate(
            model,
            example,
            proxy="weight-error",
            budgets={"size": "w4", "bops": "w4a6"} if len(subject.activations) > 1 else {"size": "w4"},
            choices=mpq.menu((2, 4, 8), subject.activations),
            adapter=adapter,
        )
        row |= _account(model, found, allocation.space.layers, allocation.space.skipped)
        at("prepare")
        calibration = [mpq.Batch(subject.inputs(n, 30 + index)) for index, n in enumerate(_CALIBRATION)]
        module = adapter.prepare(model, allocation.bits, example, calibration)
        at("export")
        path = adapter.export(module, folder / f"model{ADAPTERS[adapter_name][1]}", example)
        at("verify")
        return row | _verified(adapter, path, allocation.bits, module, subject)
    except MPQError as error:
        return row | {"outcome": "refused", "stage": stage, "text": _short(str(error))}
    except Exception as error:
        return row | {"outcome": "raw error", "stage": stage, "text": _short(f"{type(error).__name__}: {error}")}


def _trained_looking(model: nn.Module) -> nn.Module:
    """Factors and weights that begin near zero get values, in place: else they hide what stands before them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("bias") and parameter.is_floating_point() and bool((parameter.abs() < 1e-3).all()):
                nn.init.trunc_normal_(parameter, std=0.05) if parameter.dim() > 1 else nn.init.constant_(parameter, 0.5)
    return model


def _account(model: nn.Module, found: mpq.Inventory, layers: Sequence[Layer], skipped: Sequence[Skipped]) -> dict:
    """Layers and weights that get bits, what stays in float and why, and how many weights neither accounts for."""
    computed = tuple(f"{layer.name}.parametrizations." for layer in found)  # of these the computed weight counts
    plain = getattr(model, "_orig_mod", model)
    own = sum(p.numel() for name, p in plain.named_parameters() if p.dim() > 1 and not name.startswith(computed))
    own += sum(layer.n_weights for layer in found if layer.weight_name not in dict(plain.named_parameters()))
    counted = distinct_weights(layers) + sum(item.n_weights for item in skipped)
    reasons = LeftInFloat.of(layers, skipped).reasons
    return {
        "layers": len(layers),
        "found": len(found),
        "share": round(distinct_weights(layers) / max(counted, 1), 5),
        "skipped": [[reason.reason, len(reason.names), reason.names[0], round(reason.weights, 5)] for reason in reasons],
        "unaccounted": own - counted,
    }


def _verified(adapter: Any, path: Path, bits: Any, module: nn.Module, subject: Subject) -> dict:
    refusal = None
    try:
        report = mpq.verify(adapter, path, bits, module=module, inputs=subject.inputs(_TEST, 50))
    except MPQError as error:  # a file of one image
        refusal = str(error)
        report = mpq.verify(adapter, path, bits, module=module, inputs=subject.inputs(1, 50))
    outputs = report.outputs
    row = {
        "difference": float(f"{outputs.mean_relative:.2g}"),
        "allowed": float(f"{outputs.allowed:.2g}"),
        "deployed": None if outputs.deployed is None else float(f"{outputs.deployed:.2g}"),
        "batch_sizes": list(outputs.batch_sizes),
        "stage": "verify",
    }
    if not report.ok:
        return row | {"outcome": "differs", "text": _short("; ".join(report.problems))}
    if len(outputs.batch_sizes) < 2:
        return row | {"outcome": "one batch size", "text": _short(refusal or outputs.refused_batch or "")}
    return row | {"outcome": "verified", "text": ""}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def in_a_process(subject: Subject, adapter_name: str, limit_s: float) -> dict:
    """`attempt` in a fork of this process, which has everything imported; a crash or the time limit is a row too."""
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = multiprocessing.get_context("fork").Process(target=_child, args=(theirs, subject, adapter_name, log))
        process.start()
        theirs.close()
        stage, row, end = "build", None, time.monotonic() + limit_s
        with contextlib.suppress(EOFError):
            while row is None and ours.poll(max(0.0, end - time.monotonic())):
                kind, value = ours.recv()
                stage, row = (value, None) if kind == "stage" else (stage, value)
        if row is None and time.monotonic() >= end:
            row = {"outcome": "time limit", "stage": stage, "text": f"stopped after {limit_s:g} s"}
            process.kill()
        process.join()
        if row is None:
            last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][:3]
            row = {"outcome": "crash", "stage": stage, "text": _short(f"exit code {process.exitcode}: {' '.join(last)}")}
    return row


def _child(pipe: Connection, subject: Subject, adapter_name: str, log: Path) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        faulthandler.enable(stream)
        start = time.process_time()
        row = attempt(subject, adapter_name, log.parent, lambda stage: pipe.send(("stage", stage)))
        pipe.send(("row", row | {"cpu_seconds": round(time.process_time() - start, 1)}))
        pipe.close()
        os._exit(0)  # without waiting for the threads of runtimes


# The document --------------------------------------------------------------------------------------------------------


def document(cells: Mapping[str, Mapping], subjects: Iterable[Subject] = SUBJECTS) -> str:
    """docs/coverage.md of what was measured."""
    measured = [subject for subject in subjects if any(_key(subject, name) in cells for name in ADAPTERS)]
    rows = {
        (subject, name): cells[_key(subject, name)] for subject in measured for name in ADAPTERS if _key(subject, name) in cells
    }
    notes = _Notes()
    parts = [
        "# Coverage",
        f"What `python benchmarks/coverage.py` found: {len(measured)} models, {len(rows)} pairs of a model and an adapter. "
        "Each went through `find_layers`, `allocate` (weights of 2, 4 and 8 bits at the size of 4, activations of 8; in the "
        "small nets 4 and 8), `prepare` on 8 random inputs, `export` (NNCF: OpenVINO IR, Brevitas: QONNX), `verify`. Weights "
        "are random and batch normalisation fits the data: what is compared are bits, every weight code, and outputs.",
        "- *verified*: bits and all codes as asked for, and outputs of the file those of the module at batches of 3 and of 1, "
        f"within 0.001 standard deviations ({_n_verified(rows, near=False) - _n_verified(rows, near=True)} pairs).\n"
        f"- *verified ±* ({_n_verified(rows, near=True)} pairs): the same, outputs within three times what the module differs "
        "from itself when its sums are rounded otherwise (0.25 at most): deep networks of random weights amplify rounding.\n"
        "- *one batch size*: the same, but the file takes only as many images as it was exported with.\n"
        "- *refused*: ended by one of our errors, whose text stands in the note.\n"
        "- *differs*: the file was written and `verify` says what is wrong with it.",
        "`21 of 22, 99 %`: 21 of the 22 layers found get bits, with 99 % of all weights of two or more dimensions; the rest "
        "stands in `skipped`, for the reasons in the notes. Every such weight is accounted for.",
        _summary(rows),
    ]
    for group in dict.fromkeys(subject.group for subject in measured):
        lines = [f"## {group[0].upper() + group[1:] if group in ('oddities', 'recurrent') else group}", ""]
        lines += ["| model | " + " | ".join(TITLES.values()) + " |", "|---" * (1 + len(ADAPTERS)) + "|"]
        for subject in measured:
            if subject.group == group:
                told = [_told(rows.get((subject, name)), notes) for name in ADAPTERS]
                lines.append(f"| {subject.name} | {' | '.join(told)} |")
        parts.append("\n".join(lines))
    parts.append("## Notes\n\n" + notes.text())
    return "\n\n".join(parts) + "\n"


def _n_verified(rows: Mapping[tuple[Subject, str], Mapping], *, near: bool) -> int:
    """How many pairs are verified; those only whose outputs are merely near, if `near`."""
    return sum(row["outcome"] == "verified" and (_is_near(row) or not near) for row in rows.values())


def _is_near(row: Mapping) -> bool:
    return row.get("allowed", 0) > 1e-3


def _key(subject: Subject, adapter_name: str) -> str:
    return f"{subject.group}/{subject.name}/{adapter_name}"


def _summary(rows: Mapping[tuple[Subject, str], Mapping]) -> str:
    shown = [outcome for outcome in OUTCOMES if any(row["outcome"] == outcome for row in rows.values())]
    lines = ["| group | adapter | pairs | " + " | ".join(shown) + " |", "|---" * (3 + len(shown)) + "|"]
    groups = list(dict.fromkeys(subject.group for subject, _ in rows))
    for group, name in [(group, name) for group in (*groups, "all") for name in ADAPTERS]:
        found = [
            row["outcome"] for (subject, adapter), row in rows.items() if adapter == name and group in ("all", subject.group)
        ]
        lines.append(f"| {group} | {TITLES[name]} | {len(found)} | {' | '.join(str(found.count(one)) for one in shown)} |")
    return "\n".join(lines)


class _Notes:
    """Numbers for texts, in the order of their first mention."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> str:
        return str(self._numbers.setdefault(text, len(self._numbers) + 1))

    def text(self) -> str:
        return "\n".join(f"{number}. {text}" for text, number in self._numbers.items())


def _told(row: Mapping | None, notes: _Notes) -> str:
    if row is None:
        return "not run"
    told = row["outcome"] if row["outcome"] in ("verified", "one batch size") else f"**{row['outcome']}** at {row['stage']}"
    told += " ±" if row["outcome"] in ("verified", "one batch size") and _is_near(row) else ""
    if "layers" in row:
        told += f", {row['layers']} of {row['found']}, {_percent(row['share'])}"
    texts = [f"{row['stage']}: {row['text']}"] if row["text"] else []
    texts += [f"skipped: {reason}" for reason, _, _, share in row.get("skipped", ()) if share or row["share"] == 1]
    numbers = [notes.number(text) for text in texts]
    return told + (f" ({', '.join(numbers)})" if numbers else "")


def _percent(share: float) -> str:
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.3g} %"


def main() -> int:
    """Measure what is missing, print the document; 1 where a pair ended in what no pair should end in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(subject.group for subject in SUBJECTS))
    parser.add_argument("--groups", nargs="+", default=groups, choices=groups)
    parser.add_argument("--models", nargs="+", help="only these")
    parser.add_argument("--adapters", nargs="+", default=list(ADAPTERS), choices=list(ADAPTERS))
    parser.add_argument("--limit", type=float, default=300, help="seconds that a pair may take (300)")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where coverage.json is")
    parser.add_argument("--print-only", action="store_true", help="print the document of what was measured")
    options = parser.parse_args()
    cells = Cells(options.folder / "coverage.json")
    if not options.print_only:
        _measure(cells, options)
    print(document(cells.found), end="")
    return int(any(row["outcome"] in OUTCOMES[3:] or row.get("unaccounted") for row in cells.found.values()))


def _measure(cells: Cells, options: argparse.Namespace) -> None:
    wanted = [s for s in SUBJECTS if s.group in options.groups and (options.models is None or s.name in options.models)]
    missing = sorted({subject.missing for subject in wanted} - {None})
    if missing:
        print(f"not measured, since not installed: {', '.join(missing)} (pip install {' '.join(missing)})", file=sys.stderr)
    _import_all({subject.package for subject in wanted} - {None, *missing}, options.adapters)
    for subject in wanted:
        for name in options.adapters if subject.missing is None else ():
            if options.again:
                cells.found.pop(_key(subject, name), None)
            cells.get(_key(subject, name), partial(in_a_process, subject, name, options.limit))


def _import_all(packages: Iterable[str], adapters: Iterable[str]) -> None:
    """Import once what every fork needs; no thread may be started before forking."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for name in packages:
        __import__(name)
    if "nncf" in adapters:
        import nncf.torch  # noqa: F401  # for the forks
        import openvino  # noqa: F401  # for the forks
    if "brevitas" in adapters:
        import brevitas.nn  # noqa: F401  # for the forks
        import onnxoptimizer  # noqa: F401  # for the forks
        import onnxruntime  # noqa: F401  # for the forks
        import qonnx.core.modelwrapper  # noqa: F401  # for the forks


if __name__ == "__main__":
    sys.exit(main())
