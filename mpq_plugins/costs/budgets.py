"""Budgets as users write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mpq_plugins.common.plugins import resolve
from mpq_plugins.common.text import values_of
from mpq_plugins.costs.base import AbstractCost, Budget
from mpq_plugins.errors import BudgetError

Budgets = Iterable[Budget | str] | Mapping[str, float | str] | Budget | str
_EXAMPLE = "Write COST=LIMIT, such as size=w4, size=6.7MiB, bops=75G, bits=3.5 or compression=8"


def as_budgets(budgets: Budgets) -> tuple[Budget, ...]:
    """Budgets from `{"size": "w4"}`, from "size=w4", from a `Budget`, or from a sequence of the last two.

    Raises `BudgetError` and `PluginError`.
    """
    if isinstance(budgets, (Budget, str)):
        budgets = (budgets,)
    if isinstance(budgets, Mapping):
        found = [budget_of(name, limit) for name, limit in budgets.items()]
    elif isinstance(budgets, Iterable):
        found = [_one(item) for item in budgets]
    else:
        raise BudgetError(f"{budgets!r} gives no budgets. {_EXAMPLE}.")
    if not found:
        raise BudgetError("no budget was given, so every layer would take its widest bits. Give one, such as size=w4.")
    return tuple(found)


def _one(item: Any) -> Budget:
    if isinstance(item, Budget):
        return item
    if isinstance(item, str):
        return parse_budget(item)
    raise BudgetError(f"{item!r} is no budget. {_EXAMPLE}, or give a Budget(cost, limit).")


def parse_budget(text: str) -> Budget:
    """`size=w4`, or with options of the cost `stored_size?target=openvino-fast=1MiB`."""
    left, equals, limit = text.rpartition("=")
    if not equals:
        raise BudgetError(f"{text!r} is no budget. {_EXAMPLE}.")
    name, _, query = left.partition("?")
    return budget_of(name.strip(), limit.strip(), values_of(query.split("&") if query else []))


def budget_of(cost: AbstractCost | str, limit: float | str, options: Mapping[str, Any] | None = None) -> Budget:
    """The budget of a cost, by name or itself; `bits` and `compression` are other ways to say `size`."""
    if cost == "bits":
        return Budget(resolve("costs", "size"), f"{limit} bits")
    if cost == "compression":
        return Budget(resolve("costs", "size"), f"{str(limit).rstrip('xX')}x")
    return Budget(resolve("costs", cost, options), limit)
