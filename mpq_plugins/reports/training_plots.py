"""The plot of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_plugins.reports.plots import new_figure, save_figure

if TYPE_CHECKING:
    from mpq_plugins.training import EpochRecord


def plot_training(history: Sequence[EpochRecord], path: str | Path) -> Path:
    """Draw loss and accuracy over the epochs, stages shaded in turn; below them AIWQ of every layer, the most unstable first.

    `history` is that of `Trained`. `path` ends in .png, .svg or .pdf. Raises `WriteError`, and `MissingExtraError`
    without matplotlib.

    Example:
        >>> from mpq_plugins.training import EpochRecord
        >>> record = EpochRecord(1, "qat", steps=4, loss=0.7, learning_rate=0.01, seconds=1, n_images=64)
        >>> plot_training([record], "run.svg").name
        'run.svg'
    """
    measured = next((record.instability for record in reversed(history) if record.instability), {})
    n_panels = 2 if measured else 1
    width = max(8.0, 0.3 * len(measured))
    figure, axes = new_figure(n_panels, height=4.5 * n_panels, width=width)
    _draw_curves(axes[0] if measured else axes, history)
    if measured:
        n_frozen = max(record.n_frozen for record in history)
        _draw_instability(axes[1], measured, n_frozen)
    return save_figure(figure, path)


def _draw_curves(axis: Any, history: Sequence[EpochRecord]) -> None:
    epochs = [record.epoch for record in history]
    axis.plot(epochs, [record.loss for record in history], ".-", color="#1f77b4")
    axis.set_ylabel("training loss", color="#1f77b4")
    axis.set_xlabel("epoch")
    axis.set_xlim(0.5, len(history) + 0.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    stages = [(stage, [record.epoch for record in records]) for stage, records in groupby(history, key=lambda r: r.stage)]
    for index, (stage, own) in enumerate(stages if len(stages) > 1 else []):
        if index % 2:
            axis.axvspan(own[0] - 0.5, own[-1] + 0.5, color="black", alpha=0.05)
        axis.text(own[0] - 0.4, 0.98, stage, rotation=90, va="top", fontsize=7, transform=axis.get_xaxis_transform())
    if any(record.accuracy is not None for record in history):
        right = axis.twinx()
        right.plot(epochs, [record.accuracy for record in history], "s-", color="#d62728", markersize=3)
        right.set_ylabel("accuracy", color="#d62728")


def _draw_instability(axis: Any, measured: Mapping[str, float], n_frozen: int) -> None:
    order = sorted(measured, key=lambda name: -measured[name])
    frozen = set(order[:n_frozen])  # layers freeze in this order
    colours = ["#1f77b4" if name in frozen else "#9aa0a6" for name in order]
    axis.bar(range(len(order)), [measured[name] for name in order], color=colours)
    axis.set_xticks(range(len(order)), order, rotation=90, fontsize=7)
    if any(value > 0 for value in measured.values()):
        axis.set_yscale("log")
    frozen_text = f"; blue: the {n_frozen} frozen in the end" if n_frozen else ""
    axis.set_title(f"AIWQ of every layer{frozen_text}", loc="left", fontsize=10)
