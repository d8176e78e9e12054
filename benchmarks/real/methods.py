"""What each option of `prepare` is worth: ranges, corrections, equalization and rounding, one at a time.

Uniform w4a8, and weights mixed by the default score at the same size, every layer quantized. All options are kept, whether
they help or not (`held_out=0`). What takes longer than four CPU minutes is given up.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells
from data import Case
from scores import MENUS, scores_of, space_of
from weights import Weights

from adapters import _shown
from mpq_plugins import Precision
from mpq_plugins.allocation import solve_scores
from mpq_plugins.common.plugins import make
from mpq_plugins.errors import MPQError
from mpq_plugins.space.bits import BitConfig

MENU = "2-6,8"
BITS = ("w4a8", "mixed")
ADAPTERS: dict[str, dict[str, Any]] = {"nncf": {}, "brevitas": {}, "brevitas finn": {"profile": "finn"}}
METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "weight_range=max": {"weight_range": "max"},
    "activation_range=max": {"activation_range": "max"},
    "activation_range=percentile": {"activation_range": "percentile"},
    "batch_norm=kept": {"batch_norm": "kept"},
    "bias_correction=false": {"bias_correction": False},
    "equalization=smooth-quant": {"equalization": "smooth-quant"},
    "equalization=cross-layer": {"equalization": "cross-layer"},
    "rounding=gpfq": {"rounding": "gpfq"},
    "rounding=gptq": {"rounding": "gptq"},
    "rounding=qronos": {"rounding": "qronos"},
    "rounding=learned": {"rounding": "learned"},
}
CPU_SECONDS = 240.0


def measure(case: Case, cells: Cells, folder: Path, *, seed: int, names: Sequence[str], methods: Sequence[str]) -> None:
    """Fill the cells of one network; `folder` keeps scores between runs."""
    weights = Weights(case.net, case.example)
    for text, (name, method) in itertools.product(BITS, rows(case)):
        if name.split()[0] in names and method in methods:
            plan = partial(plan_of, case, weights, text, cells, folder, seed)
            cells.get(f"{case.name}/{seed}/{name}/{method}/{text}", partial(cell, case, weights, plan, name, method))


def rows(case: Case) -> Iterator[tuple[str, str]]:
    """Adapters with methods; of the finn profile only what it has alone."""
    for name, method in itertools.product(ADAPTERS, METHODS):
        if name != "brevitas finn":
            yield name, method
        elif case.loss == "kl" and (method == "default" or method.startswith("equalization")):
            yield name, method  # for a transformer Brevitas takes a minute to find that it cannot align its scales


def plan_of(case: Case, weights: Weights, text: str, cells: Cells, folder: Path, seed: int) -> dict[str, Precision]:
    """The bits of every layer: uniform, or those of the default score at the size of uniform w4."""
    if text != "mixed":
        return {name: Precision.parse(text) for name in weights.names}
    name = "kl-divergence" if case.loss == "kl" else "output-error"
    space = space_of(weights, MENUS[MENU], "free")
    scores = scores_of(case, weights, space, name, cells, folder, f"{case.name}/{seed}/{MENU}/free/{name}")
    return dict(solve_scores(scores, {"size": "w4"}).bits.layers)


def cell(case: Case, weights: Weights, plan: Any, name: str, method: str) -> dict[str, Any]:
    """Figures of the prepared module and CPU seconds of `prepare`."""
    batches = [(inputs, None) for inputs in case.calibration]
    bits = BitConfig(plan(), weights.inventory.fingerprint)
    start = time.process_time()
    try:
        adapter = make("adapters", name.split()[0], ADAPTERS[name])
        with at_most(CPU_SECONDS):
            module = adapter.prepare(case.net, bits, case.example, batches, held_out=0, **METHODS[method])
    except TooLong:
        return {"refused": f"more than {CPU_SECONDS:g} CPU seconds"}
    except MPQError as error:
        return {"refused": str(error)}
    return {"prepare_cpu_seconds": round(time.process_time() - start, 1), "figures": case.judge.of(module)}


class TooLong(BaseException):
    """A method took its CPU time; no `Exception`, which a library might catch."""


@contextmanager
def at_most(cpu_seconds: float) -> Iterator[None]:
    """Raise `TooLong` in the block after so many CPU seconds of this process."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def tables(cells: Cells, net: str, main: str) -> list[str]:
    """Markdown: a row per adapter and method that is not refused, a column per bits."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for key, value in cells.found.items():
        own, _seed, name, method, *rest = key.split("/")
        if own == net and name in ADAPTERS and rest and ("figures" in value or "CPU seconds" in value.get("refused", "")):
            found.setdefault((name, method), {})[rest[0]] = value
    if not found:
        return []
    lines = [f"{net}: {main} by the options of prepare", ""]
    lines += ["| adapter | option | " + " | ".join(BITS) + " | CPU s |", "|---" * (3 + len(BITS)) + "|"]
    for name, method in ((name, method) for name in ADAPTERS for method in METHODS if (name, method) in found):
        row = found[name, method]
        shown = [
            _shown(row[text]["figures"], main) if "figures" in row.get(text, {}) else row.get(text, {}).get("refused", "-")
            for text in BITS
        ]
        seconds = max((value["prepare_cpu_seconds"] for value in row.values() if "figures" in value), default=None)
        lines.append(f"| {name} | {method} | " + " | ".join(shown) + f" | {'-' if seconds is None else seconds} |")
    return ["\n".join(lines)]
