"""Which score finds the better bits: every score and every control, at equal size, weights only.

A score is asked once per menu and pins, and solved at every average. The plan's weights are quantized by the reference
quantizer, its batch normalisation is corrected by difference, and the network is judged. What the sensitivity engine measures
is measured once, at the six widths with nothing pinned; the smaller menu and the pins only leave choices out.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cells import Cells
from correction import correct_batch_norm
from data import Case
from weights import Weights

from mpq_plugins import Scores, Space, first_and_last, menu
from mpq_plugins.allocation import solve_scores
from mpq_plugins.common.plugins import make
from mpq_plugins.errors import MPQError
from mpq_plugins.proxies.sensitivity import AbstractSensitivity

MENUS = {"2,4,8": (2, 4, 8), "2-6,8": (2, 3, 4, 5, 6, 8)}
AVERAGES = (5, 4, 3, 2.5)
PINS = ("free", "pinned")
SECOND = ("right", "cosine_least", "kl")  # the figure that stands behind the main one


@dataclass(frozen=True)
class Score:
    """A row of the table: a proxy with its options, and on how many images."""

    proxy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    n_images: int | None = None  # None: the score looks at no images


# Scores that run the network once for each choice get fewer images: they cost that much more for each.
SCORES: dict[str, Score] = {
    "uniform": Score("uniform"),
    "constant": Score("constant"),
    "random 0": Score("random", {"seed": 0}),
    "random 1": Score("random", {"seed": 1}),
    "random 2": Score("random", {"seed": 2}),
    "projection": Score("projection"),
    "weight-error": Score("weight-error"),
    "ompq": Score("ompq", {}, 64),
    "csmpq": Score("csmpq", {}, 64),
    "fisher": Score("fisher", {}, 64),
    "output-error": Score("output-error", {}, 16),
    "kl-divergence": Score("kl-divergence", {}, 16),
    "loss-increase": Score("loss-increase", {}, 16),
    "clado gram": Score("clado", {"tier": "gram"}, 16),
    "clado gram, expansion": Score("clado", {"tier": "gram", "expansion": True}, 16),
    "clado fisher": Score("clado", {"tier": "fisher"}, 64),
    # At half of the price.
    "kl-divergence, 8 images": Score("kl-divergence", {}, 8),
    "clado fisher, 32 images": Score("clado", {"tier": "fisher"}, 32),
    # Raw: measured on the network that is not corrected, as published.
    "fisher raw": Score("fisher", {"correction": False}, 64),
    "output-error raw": Score("output-error", {"correction": False}, 16),
    "kl-divergence raw": Score("kl-divergence", {"correction": False}, 16),
    "clado gram raw": Score("clado", {"tier": "gram", "expansion": True, "correction": False}, 16),
    "clado fisher raw": Score("clado", {"tier": "fisher", "expansion": True, "correction": False}, 64),
    "rank-ensemble": Score("rank-ensemble", {}, 16),
    "hessian-trace": Score("hessian-trace", {"n_probes": 16}, 16),
}


def refusal(name: str, case: Case) -> str | None:
    """Why a score is not in the table of a network."""
    if name == "loss-increase" and case.loss == "kl":
        return "loss-increase without labels is kl-divergence"
    if name.startswith(("kl-divergence", "rank-ensemble")) and case.loss != "kl":
        return f"{name} needs class logits"
    return None


def measure(
    case: Case,
    cells: Cells,
    folder: Path,
    *,
    seed: int,
    names: Sequence[str],
    menus: Sequence[str],
    pins: Sequence[str],
    averages: Sequence[float],
    solve_seconds: float = 10.0,
) -> None:
    """Fill the cells of one network; `folder` keeps scores between runs."""
    weights = Weights(case.net, case.example)
    judged = judged_plans(case, cells, seed)
    for name, chosen, held in itertools.product(names, menus, pins):
        keys = {average: f"{case.name}/{seed}/{chosen}/{held}/{name}/{average:g}" for average in averages}
        if refusal(name, case) or all(key in cells.found for key in keys.values()):
            continue
        space = space_of(weights, MENUS[chosen], held)
        try:
            scores = scores_of(case, weights, space, name, cells, folder, f"{case.name}/{seed}/{chosen}/{held}/{name}")
        except MPQError as error:
            for key in keys.values():
                cells.get(key, partial(dict, refused=str(error)))
            continue
        for average, key in keys.items():
            cells.get(key, partial(cell, case, weights, scores, average, judged, solve_seconds))


def space_of(weights: Weights, widths: Iterable[int], held: str) -> Space:
    """The decision space: weights only, activations at 8 bits, which nothing here quantizes."""
    return Space.build(weights.inventory, menu(widths), pin=first_and_last(weights.inventory) if held == "pinned" else {})


def scores_of(case: Case, weights: Weights, space: Space, name: str, cells: Cells, folder: Path, key: str) -> Scores:
    """The scores over `space`, from `folder` where they were measured before."""
    score, proxy = SCORES[name], proxy_of(name, case)
    measured = isinstance(proxy, AbstractSensitivity) and not isinstance(proxy, _ranked())
    whole = space_of(weights, MENUS["2-6,8"], "free") if measured else space
    if measured:
        key = "/".join((*key.split("/")[:2], "2-6,8", "free", name))
    path = folder / f"{key.replace('/', '_').replace(' ', '-')}.scores.json"
    if not path.exists():
        n_images, batches = score.n_images or 0, []
        for inputs in case.calibration:
            if n_images > 0:
                batches.append((inputs, None))
                n_images -= len(inputs[0] if isinstance(inputs, tuple) else inputs)
        start = time.process_time()
        scores = proxy.score(case.net, whole, batches)
        seconds = round(time.process_time() - start, 2)
        path.parent.mkdir(parents=True, exist_ok=True)
        scores.save(path)
        cells.found.pop(f"{key}/score", None)
        cells.get(f"{key}/score", lambda: {"score_cpu_seconds": seconds, "n_images": score.n_images or 0})
    return restricted(Scores.load(path), space)


def proxy_of(name: str, case: Case) -> Any:
    """The proxy of a row, on its number of images and with the loss of the network."""
    score = SCORES[name]
    proxy = make("proxies", score.proxy, dict(score.options))
    if hasattr(proxy, "n_images") and score.n_images is not None:
        proxy = replace(proxy, n_images=score.n_images)
    return replace(proxy, loss=case.loss) if "loss" in {own.name for own in fields(proxy)} else proxy


def _ranked() -> type:
    from mpq_plugins.proxies import RankEnsemble

    return RankEnsemble  # ranks depend on the choices there are


def restricted(scores: Scores, space: Space) -> Scores:
    """The scores of the choices that `space` has, of the same units."""
    own, wanted = ([unit.choices for unit in part.units] for part in (scores.space, space))
    if own == wanted or len(own) != len(wanted):  # the uniform control has one unit
        return scores
    kept = [[there.index(choice) for choice in choices] for there, choices in zip(own, wanted, strict=True)]
    loss = tuple(tuple(row[i] for i in indices) for row, indices in zip(scores.loss, kept, strict=True))
    starts = np.cumsum([0, *map(len, own)])
    columns = [start + i for start, indices in zip(starts, kept, strict=False) for i in indices]
    pairwise = None if scores.pairwise is None else scores.pairwise[np.ix_(columns, columns)]
    return Scores(space, loss, scores.proxy, {}, pairwise)


def cell(
    case: Case, weights: Weights, scores: Scores, average: float, judged: dict[str, Any], solve_seconds: float
) -> dict[str, Any]:
    """The plan at one average, and what it is worth."""
    start = time.process_time()
    try:
        found = solve_scores(scores, {"size": f"w{average:g}"}, solver=make("solvers", "auto", {"time_limit_s": solve_seconds}))
    except MPQError as error:
        return {"refused": str(error)}
    solve = round(time.process_time() - start, 2)
    bits = {name: precision.weight for name, precision in found.bits.layers.items()}
    return {
        **{"solve_cpu_seconds": solve, "status": found.solution.status.name, "average": round(weights.average(bits), 3)},
        **judge_plan(case, weights, bits, judged),
    }


def judged_plans(case: Case, cells: Cells, seed: int) -> dict[str, Any]:
    """The plans of one network that were judged after a correction with the calibration inputs of this seed."""
    return {
        cell["plan"]: cell for key, cell in cells.found.items() if key.startswith(f"{case.name}/{seed}/") and "plan" in cell
    }


def judge_plan(case: Case, weights: Weights, bits: Mapping[str, int], judged: dict[str, Any]) -> dict[str, Any]:
    """Figures of a plan, which are not measured twice."""
    plan = "".join(str(bits[name]) for name in weights.names)
    if plan not in judged:
        module = weights.at(bits)
        correct_batch_norm(case.net, module, case.calibration)
        judged[plan] = {"plan": plan, "figures": case.judge.of(module)}
    return {"plan": plan, "figures": judged[plan]["figures"]}


def tables(cells: Cells, net: str, main: str) -> list[str]:
    """Markdown: one table per menu and pins, a row per score; the mean over the seeds of the calibration images."""
    found: dict[tuple[str, str], dict[str, dict[str, list[dict[str, Any]]]]] = {}
    seconds: dict[tuple[str, str], dict[str, float]] = {}
    for key, value in cells.found.items():
        own, seed, chosen, held, name, average = key.split("/")
        if own == net and average == "score":
            of_row = seconds.setdefault((chosen, held), {})
            of_row[name] = value["score_cpu_seconds"] if seed == "0" else of_row.get(name, value["score_cpu_seconds"])
        elif own == net and "figures" in value:
            found.setdefault((chosen, held), {}).setdefault(name, {}).setdefault(average, []).append(value)
    parts = []
    for (chosen, held), rows in sorted(found.items()):
        measured = {average for row in rows.values() for average in row}
        averages = [f"{average:g}" for average in AVERAGES if f"{average:g}" in measured]
        best = {
            average: min((_mean(row[average], main) for row in rows.values() if average in row), default=None)
            for average in averages
        }
        head = "bits on average" if held == "free" else "size of uniform, first and last at 8"
        lines = [f"{net}, weights {{{chosen}}}, {held}: {main} by {head}", ""]
        lines += ["| score | CPU s | " + " | ".join(averages) + " |", "|---" * (2 + len(averages)) + "|"]
        for name in dict.fromkeys([*SCORES, *rows]):
            if name in rows:
                own_seconds = seconds.get((chosen, held), {}).get(name)
                shown = [_shown(rows[name].get(average), main, best[average]) for average in averages]
                lines.append(f"| {name} | {'-' if own_seconds is None else own_seconds} | " + " | ".join(shown) + " |")
        parts.append("\n".join(lines))
    return [*parts, _behind(found, main)] if found else []


def _behind(found: Mapping[tuple[str, str], Mapping[str, Mapping[str, list[dict[str, Any]]]]], main: str) -> str:
    """Where the default of `mpq allocate` is behind another row by more than two standard errors, seed by seed."""
    lines = []
    for (chosen, held), rows in sorted(found.items()):
        default = "kl-divergence" if main == "kl" else "output-error"  # of `mpq allocate`
        for name, row in rows.items():
            for average in row if default in rows and name != default else ():
                both = [[value["figures"][main] for value in own.get(average, [])] for own in (rows[default], row)]
                if len(both[0]) == len(both[1]) > 1:
                    gaps = np.subtract(*both)
                    if gaps.mean() > 2 * gaps.std(ddof=1) / len(gaps) ** 0.5:
                        ours, theirs = (f"{np.mean(values):.3g}" for values in both)
                        lines.append(f"- {{{chosen}}}, {held}, {average}: {default} {ours}, {name} {theirs}")
    return "\n".join(
        ["The default is behind by more than two standard errors of the difference:", "", *(lines or ["- nowhere"])]
    )


def _mean(found: Sequence[Mapping[str, Any]], main: str) -> float:
    return float(np.mean([value["figures"][main] for value in found]))


def _shown(found: Sequence[Mapping[str, Any]] | None, main: str, best: float | None) -> str:
    if not found:
        return "-"
    mean = _mean(found, main)
    text = f"{mean:.3g}"
    if len(found) > 1:
        text += f" ± {np.std([value['figures'][main] for value in found], ddof=1) / len(found) ** 0.5:.2g}"
    if best is not None and mean <= best * 1.005:
        text = f"**{text}**"
    second = next((key for key in SECOND if key in found[0]["figures"] and key != main), None)
    if second is not None:
        text += f", {np.mean([value['figures'][second] for value in found]):.3g}"
    return text + ("" if all(value["status"] == "optimal" for value in found) else " (unproven)")
