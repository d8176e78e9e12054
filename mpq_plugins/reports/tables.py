"""Tables for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from mpq_plugins.allocation import Allocation
from mpq_plugins.costs import BitOps, WeightSize
from mpq_plugins.costs.base import format_amount
from mpq_plugins.model.layers import Inventory, Layer, Skipped
from mpq_plugins.model.left_in_float import LeftInFloat, shares

if TYPE_CHECKING:
    from mpq_plugins.reports.comparison import Comparison, Row


def layer_table(inventory: Inventory) -> Table:
    """One row per layer: kind, shapes, weights, MACs."""
    facts, numbers = ("layer", "kind", "weight", "groups", "calls"), ("weights", "MACs", "output")
    table = _table(f"{len(inventory)} layers", facts, numbers)
    for layer in inventory:
        kind = layer.kind + (" (functional)" if layer.functional else "")
        shape = "x".join(map(str, layer.weight_shape))
        shared = f" = {layer.shares_weight_with}" if layer.shares_weight_with else ""
        table.add_row(
            layer.name,
            kind,
            shape + shared,
            str(layer.groups),
            str(layer.n_calls),
            f"{layer.n_weights:,}",
            format_amount(layer.macs, ""),
            "x".join(map(str, layer.output_shape)),
        )
    return table


def skipped_table(skipped: Iterable[Skipped], layers: Iterable[Layer]) -> Table | None:
    """What stays in float beside `layers`, how much that is, and why; None when nothing does."""
    rows = tuple(skipped)
    if not rows:
        return None
    left = LeftInFloat.of(layers, rows)
    title = f"{len(rows)} not quantized: {shares(left.weights, left.macs)}"
    table = _table(title, ("what",), ("weights", "MACs"), ("reason",))
    for item in rows:
        table.add_row(item.name, f"{item.n_weights:,}", format_amount(item.macs, ""), item.reason)
    return table


def allocation_table(allocation: Allocation) -> Table:
    """Bits, size and share of the budget of every layer."""
    space, bits = allocation.space, allocation.bits
    size, bit_ops = WeightSize(), BitOps()
    title = f"bit configuration, weight bits on average: {allocation.average_bits}"
    table = _table(title, ("layer",), ("weight bits", "activation bits", "size", "BOPs"), ("",))
    for layer in space.layers:
        precision = bits[layer.name]
        table.add_row(
            layer.name,
            str(precision.weight),
            str(precision.activation),
            format_amount(size.of(layer, precision), "B"),
            format_amount(bit_ops.of(layer, precision), ""),
            "pinned" if layer.name in space.pins else "█" * precision.weight,
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    """One row per proxy, budget and adapter; seeds of a random control share a row with their median and range."""
    title, names = f"float accuracy {comparison.float_accuracy:.3f}", ("budget", "proxy", "adapter")
    table = _table(title, names, ("accuracy", "lost", "size", "BOPs", "gap", "seconds"))
    previous = ""
    for rows in comparison.grouped():
        first = rows[0]
        if previous and first.budget != previous:
            table.add_section()
        previous = first.budget
        accuracies = [row.accuracy for row in rows]
        accuracy = statistics.median(accuracies)
        spread = "" if len(rows) == 1 else f" ({min(accuracies):.3f} to {max(accuracies):.3f})"
        table.add_row(
            first.budget,
            first.family if len(rows) == 1 else f"{first.family}, {len(rows)} seeds",
            first.adapter,
            f"{accuracy:.3f}{spread}",
            f"{comparison.float_accuracy - accuracy:+.3f}",
            _mean_amount(rows, "size", "B"),
            _mean_amount(rows, "bops", ""),
            f"{max(row.gap for row in rows):.0e}",
            f"{sum(row.seconds for row in rows):.1f}",
        )
    return table


def _table(title: str, texts: Sequence[str], numbers: Sequence[str], further: Sequence[str] = ()) -> Table:
    """An empty table with columns of texts and of numbers."""
    table = Table(title=title, title_justify="left")
    for column in (*texts, *numbers, *further):
        table.add_column(column, justify="right" if column in numbers else "left")
    return table


def _mean_amount(rows: Sequence[Row], cost: str, unit: str) -> str:
    return format_amount(statistics.mean(row.bits.costs[cost] for row in rows), unit)
