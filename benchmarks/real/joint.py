"""Weight and activation bits together, under a budget of size and one of bit operations at once.

Six weight widths with three activation widths, nothing pinned, activation quantizers tied as NNCF shares them. Every plan comes
from `mpq.allocate`, is prepared by the NNCF adapter with 32 calibration inputs and judged as a module.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells
from data import Case
from scores import _shown, proxy_of, refusal

import mpq_plugins as mpq
from mpq_plugins.common.plugins import make
from mpq_plugins.errors import MPQError

WEIGHTS, ACTIVATIONS = (2, 3, 4, 5, 6, 8), (4, 6, 8)
BUDGETS = {"w4, w4a6": {"size": "w4", "bops": "w4a6"}, "w5, w5a6": {"size": "w5", "bops": "w5a6"}}
OWN = "as the budgets"  # the uniform precision that they are named for
# CLADO before KL divergence, which takes its losses from CLADO's measurements.
SCORES = ("uniform", "constant", "random 0", "weight-error", "clado gram", "kl-divergence", "output-error", "clado fisher")
STANDIN_SCORES = ("uniform", "clado gram")
N_IMAGES = 32
SOLVE_SECONDS = 15.0


def measure(case: Case, cells: Cells, folder: Path, *, seed: int, names: Sequence[str]) -> None:
    """Fill the cells of one network with those of `names` that the table has; `folder` keeps measurements between runs."""
    judged: dict[tuple[str, ...], dict[str, float]] = {}
    for name in (OWN, *(own for own in SCORES if own in names)):
        if refusal(name, case) or (name == "output-error" and case.loss == "kl"):
            continue
        for budget in BUDGETS:
            cells.get(f"{case.name}/{seed}/{budget}/{name}", partial(cell, case, name, budget, folder, judged))


def cell(case: Case, name: str, budget: str, folder: Path, judged: dict[tuple[str, ...], dict[str, float]]) -> dict[str, Any]:
    """The plan of a score under one pair of budgets, and what it is worth."""
    adapter = make("adapters", "nncf")
    proxy = proxy_of("uniform" if name == OWN else name, case)
    if "interpolate" in {own.name for own in fields(proxy)}:
        # Nothing is interpolated where activations have a choice; said, it is the measurement that CLADO makes.
        proxy = replace(proxy, interpolate=False)
    batches = [(inputs, None) for inputs in case.calibration]
    start = time.process_time()
    try:
        allocation = mpq.allocate(
            case.net,
            case.example,
            batches,
            budgets=BUDGETS[budget],
            proxy=proxy,
            choices=(BUDGETS[budget]["bops"],) if name == OWN else mpq.menu(WEIGHTS, ACTIVATIONS),
            adapter=adapter,
            solver=make("solvers", "auto", {"time_limit_s": SOLVE_SECONDS}),
            cache=folder,
        )
        seconds = round(time.process_time() - start, 2)
        bits = {layer: str(precision) for layer, precision in allocation.bits.layers.items()}
        plan = tuple(bits.values())
        start = time.process_time()
        if plan not in judged:
            judged[plan] = case.judge.of(adapter.prepare(case.net, allocation.bits, case.example, first_images(batches)))
    except MPQError as error:
        return {"refused": str(error)}
    return {
        "allocate_cpu_seconds": seconds,
        "judge_cpu_seconds": round(time.process_time() - start, 1),
        "status": allocation.solution.status.name,
        "average": round(allocation.average_bits.overall, 3),
        "used": [round(1 - unused / limit, 4) for unused, limit in unused_of(allocation)],
        "plan": " ".join(plan),
        "figures": judged[plan],
    }


def unused_of(allocation: mpq.Allocation) -> list[tuple[float, float]]:
    """What is left of each budget, with its limit."""
    limits = [budget["limit"] for budget in allocation.bits.origin["budgets"]]
    return list(zip(allocation.solution.unused, limits, strict=True))


def first_images(batches: Sequence[tuple[Any, None]], n_images: int = N_IMAGES) -> list[tuple[Any, None]]:
    """Whole batches until there are `n_images`."""
    found, n_found = [], 0
    for inputs, labels in batches:
        if n_found < n_images:
            found.append((inputs, labels))
            n_found += len(inputs[0] if isinstance(inputs, tuple) else inputs)
    return found


def tables(cells: Cells, net: str, main: str) -> list[str]:
    """Markdown: a row per score, a column per pair of budgets; the mean over the seeds."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for key, value in cells.found.items():
        own, _seed, budget, name = key.split("/")
        if own == net and "figures" in value:
            found.setdefault(name, {}).setdefault(budget, []).append(value)
    if not found:
        return []
    best = {
        budget: min(sum(v["figures"][main] for v in row[budget]) / len(row[budget]) for row in found.values() if budget in row)
        for budget in BUDGETS
    }
    lines = [f"{net}, bits {{2-6,8}} of weights and {{4,6,8}} of activations: {main} by size, bit operations of uniform", ""]
    lines += ["| score | CPU s | " + " | ".join(BUDGETS) + " |", "|---" * (2 + len(BUDGETS)) + "|"]
    for name in (own for own in (OWN, *SCORES) if own in found):
        row = found[name]
        seconds: Any = max(value["allocate_cpu_seconds"] for values in row.values() for value in values)
        if name == "kl-divergence" and "clado gram" in found:
            seconds = "of clado gram"  # whose measurements it took up
        shown = [_shown(row.get(budget), main, best.get(budget)) for budget in BUDGETS]
        lines.append(f"| {name} | {seconds} | " + " | ".join(shown) + " |")
    return ["\n".join(lines)]
