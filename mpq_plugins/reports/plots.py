"""Plots: matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_plugins.allocation import Allocation
from mpq_plugins.common.files import write_whole
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import WriteError
from mpq_plugins.reports.comparison import Comparison


def plot_allocation(allocation: Allocation, path: str | Path) -> Path:
    """Draw bits along the depth of the network above the size of each layer, and the loss of every choice as a heat map.

    Where the score of `allocation` has pairwise losses, a third panel shows how units interact at their narrowest choices.
    `path` ends in .png, .svg or .pdf. Raises `WriteError`, and `MissingExtraError` without matplotlib.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
        >>> allocation = mpq.allocate(model, torch.zeros(1, 16), budgets="size=w4", proxy="weight-error")
        >>> plot_allocation(allocation, "bits.svg").name
        'bits.svg'
    """
    width = max(7.0, 0.32 * len(allocation.space.layers))
    if allocation.scores.pairwise is None:
        figure, axes = new_figure(2, height=8, width=width)
    else:
        figure, axes = new_figure(3, height=8 + width, width=width, ratios=(4, 4, width))
        _draw_interactions(figure, axes[2], allocation, allocation.scores.pairwise)
    _draw_bits(axes[0], allocation)
    _draw_losses(figure, axes[1], allocation)
    return save_figure(figure, path)


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """Draw the accuracy of every proxy and control, one panel per budget; seeds of the random control as single dots.

    `comparison` is what `compare` returns. `path` ends in .png, .svg or .pdf. Raises `WriteError`, and `MissingExtraError`
    without matplotlib.

    Example:
        >>> from mpq_plugins.reports.comparison import Comparison, Row
        >>> bits = mpq.BitConfig({"conv1": 4}, "sha256:0", costs={"size": 64, "bops": 1e6})
        >>> plot_comparison(Comparison(0.9, (Row("w4", "ompq", "nncf", 0.8, 0, 1, bits),)), "accuracy.svg").name
        'accuracy.svg'
    """
    budgets = list(dict.fromkeys(row.budget for row in comparison.rows))
    figure, axes = new_figure(len(budgets), height=1.0 + 2.6 * len(budgets), width=8)
    families = list(dict.fromkeys(row.family for row in comparison.rows))
    adapters = list(dict.fromkeys(row.adapter for row in comparison.rows))
    for axis, budget in zip(np.atleast_1d(axes), budgets, strict=True):
        for index, adapter in enumerate(adapters):
            rows = [row for row in comparison.rows if row.budget == budget and row.adapter == adapter]
            offset = (index - (len(adapters) - 1) / 2) * 0.18
            heights = [families.index(row.family) + offset for row in rows]
            axis.plot([row.accuracy for row in rows], heights, "os^D"[index % 4], alpha=0.75, label=adapter)
        axis.axvline(comparison.float_accuracy, color="grey", linestyle=":", label="float")
        axis.set_yticks(range(len(families)), families)
        axis.invert_yaxis()
        axis.set_title(budget, loc="left")
        axis.grid(axis="x", alpha=0.3)
    np.atleast_1d(axes)[-1].set_xlabel("accuracy")
    np.atleast_1d(axes)[0].legend(fontsize=8)
    return save_figure(figure, path)


def _draw_bits(axis: Any, allocation: Allocation) -> None:
    layers = allocation.space.layers
    positions = range(len(layers))
    precisions = [allocation.bits[layer.name] for layer in layers]
    pinned = [layer.name in allocation.space.pins for layer in layers]
    colours = ["#9aa0a6" if is_pinned else "#1f77b4" for is_pinned in pinned]
    axis.bar(positions, [precision.weight for precision in precisions], color=colours, label="weight bits (grey: pinned)")
    axis.plot(positions, [precision.activation for precision in precisions], "k_", markersize=9, label="activation bits")
    axis.set_ylim(0, 9.5)
    axis.set_xlim(-0.5, len(layers) - 0.5)  # above the columns of the losses
    axis.set_ylabel("bits")
    axis.set_xticks([])
    sizes = axis.twinx()
    sizes.plot(positions, [layer.n_weights for layer in layers], ".-", color="#d62728", linewidth=0.8, label="weights")
    sizes.set_yscale("log")
    sizes.set_ylabel("weights in the layer", color="#d62728")
    axis.legend(loc="upper left", fontsize=8, ncols=2)
    costs = ", ".join(f"{name} {value:,.0f}" for name, value in allocation.bits.costs.items())
    axis.set_title(f"{allocation.scores.proxy.get('name', '')}: {costs}", loc="left", fontsize=10)


def _draw_losses(figure: Any, axis: Any, allocation: Allocation) -> None:
    space = allocation.space
    menu = sorted({choice for unit in space.units for choice in unit.choices})
    table = np.full((len(menu), len(space.units)), np.nan)
    for column, (unit, losses) in enumerate(zip(space.units, allocation.scores.alone(), strict=True)):
        if not space.is_free(unit):
            continue
        for choice, loss in zip(unit.choices, losses, strict=True):
            table[menu.index(choice), column] = loss - min(losses)
    shown = np.log10(np.where(table > 0, table, np.nan))
    image = axis.imshow(shown, aspect="auto", cmap="viridis")
    chosen = [menu.index(allocation.bits[unit.layers[0]]) for unit in space.units]
    axis.plot(range(len(space.units)), chosen, "wo", markersize=4, markeredgecolor="k")
    axis.set_yticks(range(len(menu)), [str(choice) for choice in menu])
    axis.set_xticks(range(len(space.units)), [unit.layers[0] for unit in space.units], rotation=90, fontsize=7)
    axis.set_title("log10 of the loss above the unit's best choice; dots are chosen", loc="left", fontsize=10)
    figure.colorbar(image, ax=axis, fraction=0.02, pad=0.01)


def _draw_interactions(figure: Any, axis: Any, allocation: Allocation, pairwise: np.ndarray) -> None:
    space = allocation.space
    start = np.cumsum([0, *(len(unit.choices) for unit in space.units)])
    free = [index for index, unit in enumerate(space.units) if space.is_free(unit)]
    narrowest = [start[index] + space.units[index].choices.index(min(space.units[index].choices)) for index in free]
    shown = pairwise[np.ix_(narrowest, narrowest)].copy()
    np.fill_diagonal(shown, np.nan)
    most = float(np.nanmax(np.abs(shown))) if len(free) > 1 else 1.0
    image = axis.imshow(shown, cmap="RdBu_r", vmin=-(most or 1.0), vmax=most or 1.0)
    names = [space.units[index].layers[0] for index in free]
    axis.set_xticks(range(len(free)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(free)), names, fontsize=7)
    axis.set_title(
        "interaction of units at their narrowest choices: red adds to the loss, blue cancels", loc="left", fontsize=10
    )
    figure.colorbar(image, ax=axis, fraction=0.03, pad=0.01)


def new_figure(n_rows: int, *, height: float, width: float, ratios: Sequence[float] | None = None) -> tuple[Any, Any]:
    """A figure of `n_rows` axes, and those."""
    require("matplotlib", "plots").use("Agg")
    pyplot = require("matplotlib.pyplot", "plots")
    figure, axes = pyplot.subplots(n_rows, 1, figsize=(width, height), layout="constrained", height_ratios=ratios)
    return figure, axes


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write the figure in the format of the path's suffix; raises `WriteError`."""
    known = figure.canvas.get_supported_filetypes()
    try:
        if Path(path).suffix.lstrip(".").lower() not in known:
            raise WriteError(f"{path} names no picture format. End it in .png, .svg or .pdf ({', '.join(sorted(known))} work).")
        return write_whole(path, lambda temporary: figure.savefig(temporary, dpi=120))
    finally:
        require("matplotlib.pyplot", "plots").close(figure)
