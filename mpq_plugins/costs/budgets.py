"""Budgets as users write them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mpq_plugins.common.plugins import resolve
from mpq_plugins.common.text import values_of, words_of
from mpq_plugins.costs.base import Budget
from mpq_plugins.errors import BudgetError

Budgets = Iterable[Budget | str] | Mapping[str, float | str] | Budget | str
_EXAMPLE = "Write COST=LIMIT, such as size=w4, size=6.7MiB, bops=75G, bits=3.5 or compression=8"


def as_budgets(budgets: Budgets, *, at_least: int = 1) -> tuple[Budget, ...]:
    """Budgets from `{"size": "w4"}`, from "size=w4,bops=60%", from a `Budget`, or from a sequence of the last two.

    Options of a cost follow its name: `stored_size?target=openvino-fast=1MiB`. Raises `BudgetError` and `PluginError`.
    """
    if isinstance(budgets, (Budget, str)):
        budgets = (budgets,)
    if isinstance(budgets, Mapping):
        found = [_budget(cost, limit) for cost, limit in budgets.items()]
    elif isinstance(budgets, Iterable):
        found = [budget for item in budgets for budget in _read(item)]
    else:
        raise BudgetError(f"{budgets!r} gives no budgets. {_EXAMPLE}.")
    if len(found) < at_least:
        raise BudgetError("no budget was given, so every layer would take its widest bits. Give one, such as size=w4.")
    return tuple(found)


def _read(item: Any) -> list[Budget]:
    if isinstance(item, Budget):
        return [item]
    if not isinstance(item, str):
        raise BudgetError(f"{item!r} is no budget. {_EXAMPLE}, or give a Budget(cost, limit).")
    pairs = [text.rpartition("=") for text in words_of(item) or [item]]
    if not all(equals for _, equals, _ in pairs):
        raise BudgetError(f"{item!r} is no budget. {_EXAMPLE}.")
    return [_budget(cost.strip(), limit.strip()) for cost, _, limit in pairs]


def _budget(cost: Any, limit: float | str) -> Budget:
    if isinstance(cost, str) and "?" in cost:
        name, _, query = cost.partition("?")
        cost = resolve("costs", name, values_of(query.split("&")))
    return Budget(cost, limit)
