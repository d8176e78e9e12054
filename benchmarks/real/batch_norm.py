"""What to do with batch normalisation after quantization: keep it, re-estimate it, or move it by the difference.

Uniform weights, first and last layer at 8 bits, activations in float. Networks without batch normalisation have their
biases corrected by difference instead, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from cells import Cells
from correction import correct_batch_norm, correct_biases
from data import Case
from scores import SECOND
from torch import nn
from weights import Weights

from mpq_plugins.training import reestimate_batch_norm

WIDTHS = (8, 5, 4, 3)
WAYS = ("kept", "re-estimated", "corrected")


def measure(case: Case, cells: Cells, *, seed: int) -> None:
    """Fill the cells of one network."""
    weights = Weights(case.net, case.example)
    for width in WIDTHS:
        for way in WAYS:
            cells.get(f"{case.name}/{seed}/w{width}/{way}", lambda w=width, y=way: cell(case, weights, w, y))


def cell(case: Case, weights: Weights, width: int, way: str) -> dict[str, Any]:
    """Figures of one way at one width."""
    module = weights.at(weights.uniform(width, pinned=True))
    normalised = any(isinstance(child, nn.modules.batchnorm._BatchNorm) for child in module.modules())
    if way == "re-estimated":
        if not normalised:
            return {"refused": "the network has no batch normalisation"}
        reestimate_batch_norm(module, [(inputs, None) for inputs in case.calibration])
    elif way == "corrected" and normalised:
        correct_batch_norm(case.net, module, case.calibration)
    elif way == "corrected":
        correct_biases(case.net, module, case.calibration, weights.names)
    return {"figures": case.judge.of(module)}


def tables(cells: Cells, net: str, main: str) -> list[str]:
    """Markdown: a row per width, a column per way."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for key, value in cells.found.items():
        own, _seed, width, way = key.split("/")
        if own == net and "figures" in value:
            found.setdefault((width, way), []).append(value["figures"])
    if not found:
        return []
    instead = (
        " (it has none: biases of all layers, which prepare leaves alone where there is a row per token)"
        if any("no batch norm" in value.get("refused", "") for value in cells.found.values())
        else ""
    )
    lines = [f"{net}: {main} by what is done with batch normalisation{instead}", ""]
    lines += ["| weights | " + " | ".join(WAYS) + " |", "|---" * (1 + len(WAYS)) + "|"]
    lines += [f"| w{w} | " + " | ".join(_shown(found.get((f"w{w}", way)), main) for way in WAYS) + " |" for w in WIDTHS]
    return ["\n".join(lines)]


def _shown(found: Sequence[Mapping[str, Any]] | None, main: str) -> str:
    if not found:
        return "-"
    values = [figures[main] for figures in found]
    error = f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.2g}" if len(values) > 1 else ""
    second = next((key for key in SECOND if key in found[0] and key != main), None)
    behind = "" if second is None else f", {np.mean([figures[second] for figures in found]):.4g}"
    return f"{np.mean(values):.3g}{error}{behind}"
