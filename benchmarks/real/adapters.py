"""Through the frameworks: what `prepare` makes, and what the exported file gives in its own runtime.

Weights as named with first and last layer at 8 bits, activations at 8 bits, options at their defaults.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import Cells
from data import Case
from scores import SECOND

from mpq_plugins import Precision, find_layers, first_and_last
from mpq_plugins.common.plugins import make
from mpq_plugins.errors import MPQError
from mpq_plugins.space.bits import BitConfig

BITS = ("w8a8", "w4a8", "w3a8")


def measure(case: Case, cells: Cells, *, seed: int, names: Sequence[str], widths: Sequence[str]) -> None:
    """Fill the cells of one network."""
    for name in names:
        for text in widths:
            cells.get(f"{case.name}/{seed}/{name}/{text}", lambda n=name, t=text: cell(case, n, t))


def cell(case: Case, name: str, text: str) -> dict[str, Any]:
    """Figures of the module and of the file, CPU seconds of each step, how many layers are quantized."""
    try:
        adapter = make("adapters", name)
        inventory = find_layers(case.net, case.example)
        left = adapter.unconvertible(case.net, inventory, case.example)
        pins = first_and_last(inventory)
        layers = {layer.name: Precision.parse(str(pins.get(layer.name, text))) for layer in inventory if layer.name not in left}
        share = sum(layer.n_weights for layer in inventory if layer.name in layers) / sum(
            layer.n_weights for layer in inventory
        )
        found = {"layers": len(layers), "of": len(list(inventory)), "share_of_weights": round(share, 4)}
        bits = BitConfig(layers, inventory.fingerprint)
        clock = Clock()
        module = adapter.prepare(case.net, bits, case.example, [(inputs, None) for inputs in case.calibration])
        clock.lap("prepare")
        found["module"] = case.judge.of(module)
        clock.lap("judge")
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = adapter.export(module, Path(folder) / "model", case.example)
                clock.lap("export")
                found["file"] = case.judge.of_file(adapter, path)
                clock.lap("run")
            except MPQError as error:
                found["file_refused"] = str(error)
    except MPQError as error:
        return {"refused": str(error)}
    return {**found, "seconds": clock.laps}


class Clock:
    """CPU seconds since the last lap."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        """Write down what passed."""
        now = time.process_time()
        self.laps[name], self._last = round(now - self._last, 1), now


def tables(cells: Cells, net: str, main: str) -> list[str]:
    """Markdown: a row per adapter and bits."""
    lines = [f"{net}: {main} through the adapters", ""]
    lines += ["| adapter | bits | layers | weights | module | file | CPU s: prepare | export |", "|---" * 8 + "|"]
    for key, value in sorted(cells.found.items()):
        own, _seed, name, text = key.split("/")
        if own != net:
            continue
        if "refused" in value:
            lines.append(f"| {name} | {text} | refused: {value['refused']} | | | | | |")
            continue
        seconds = value["seconds"]
        lines.append(
            f"| {name} | {text} | {value['layers']} of {value['of']} | {value['share_of_weights']:.0%} | "
            f"{_shown(value['module'], main)} | {_shown(value['file'], main) if 'file' in value else 'refused'} | "
            f"{seconds['prepare']} | {seconds.get('export', '-')} |"
        )
    return ["\n".join(lines)] if len(lines) > 4 else []


def _shown(figures: Mapping[str, Any], main: str) -> str:
    second = next((key for key in SECOND if key in figures and key != main), None)
    return f"{figures[main]:.3g}" + ("" if second is None else f", {figures[second]:.4g}")
