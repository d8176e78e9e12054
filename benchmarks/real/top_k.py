"""Is it worth measuring the best plans of a score: its own first plan against the best of its top 16.

Weights only, six widths, nothing pinned. The 16 plans are measured on 32 calibration inputs with all layers quantized and
corrected, and the one of least measured loss is judged on the test inputs beside the first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cells import Cells
from data import Case
from scores import MENUS, judge_plan, refusal, scores_of, space_of
from weights import Weights

from mpq_plugins import Scores
from mpq_plugins.allocation import Allocation, solve_scores
from mpq_plugins.errors import MPQError
from mpq_plugins.proxies.measuring import MeasurementOptions, SensitivityRun

MENU = "2-6,8"
SCORES = (
    "constant",
    "weight-error",
    "fisher",
    "kl-divergence",
    "output-error",
    "clado gram",
    "clado gram, expansion",
    "clado fisher",
)
AVERAGES = (5, 4, 3)
TOP = 16
N_IMAGES = 32


def measure(
    case: Case,
    cells: Cells,
    folder: Path,
    *,
    seed: int,
    names: Sequence[str],
    judged: Mapping[str, Any],
    averages: Sequence[float],
) -> None:
    """Fill the cells of one network with those of `names` and `averages` that the table has.

    `judged` are plans whose figures are known, as `judge_plan` takes them.
    """
    weights = Weights(case.net, case.example)
    space = space_of(weights, MENUS[MENU], "free")
    lab = SensitivityRun(
        case.net, space, [(inputs, None) for inputs in case.calibration], MeasurementOptions(loss=case.loss, n_images=N_IMAGES)
    )
    known = dict(judged)
    for name in (own for own in SCORES if own in names):
        keys = {average: f"{case.name}/{seed}/{name}/{average:g}" for average in AVERAGES if average in averages}
        if refusal(name, case) or all(key in cells.found for key in keys.values()):
            continue
        if name == "output-error" and case.loss == "kl":
            continue
        scores = scores_of(case, weights, space, name, cells, folder, f"{case.name}/{seed}/{MENU}/free/{name}")
        for average, key in keys.items():
            cells.get(key, partial(cell, case, weights, scores, lab, average, known))


def cell(
    case: Case, weights: Weights, scores: Scores, lab: SensitivityRun, average: float, judged: dict[str, Any]
) -> dict[str, Any]:
    """The first plan and the best of the top: measured on calibration inputs, judged on test inputs."""
    start = time.process_time()
    try:
        budgets = {"size": f"w{average:g}"}
        first = solve_scores(scores, budgets)
        found = solve_scores(scores, budgets, top_k=TOP, measure=lab.losses_at)
    except MPQError as error:
        return {"refused": str(error)}
    seconds = round(time.process_time() - start, 1)
    if found.selection is None:
        return {"refused": "there is no other plan"}
    return {
        "select_cpu_seconds": seconds,
        "measured": [round(value, 5) for value in found.selection.measured],
        "position": found.selection.kept,
        "own": judge_plan(case, weights, _bits(first), judged),
        "best": judge_plan(case, weights, _bits(found), judged),
    }


def _bits(allocation: Allocation) -> dict[str, int]:
    return {name: precision.weight for name, precision in allocation.bits.layers.items()}


def tables(cells: Cells, net: str, main: str) -> list[str]:
    """Markdown: a row per score and average, what was measured on calibration inputs beside what test inputs say."""
    lines = [f"{net}, bits {{{MENU}}}, free: {main} of the first plan and of the best measured of {TOP}", ""]
    lines += ["| score | bits | first: measured | kept: measured | position | first | kept | CPU s |", "|---" * 8 + "|"]
    rows = [(key.split("/"), value) for key, value in cells.found.items() if "measured" in value]
    for (own, seed, name, average), value in sorted(
        rows, key=lambda row: (SCORES.index(row[0][2]), -float(row[0][3]), row[0][1])
    ):
        if own == net:
            measured, position = value["measured"], value["position"]
            figures = [f"{value[which]['figures'][main]:.3g}" for which in ("own", "best")]
            named = name if seed == "0" else f"{name}, seed {seed}"
            lines.append(
                f"| {named} | {average} | {measured[0]:.3g} | {measured[position]:.3g} | {position + 1} of {len(measured)} | "
                f"{figures[0]} | {figures[1]} | {value['select_cpu_seconds']} |"
            )
    return ["\n".join(lines)] if len(lines) > 4 else []
