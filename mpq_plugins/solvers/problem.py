"""The allocation problem as numbers: one choice per unit, least total loss, within every limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpq_plugins.costs.base import Budget, cost_of, format_amount
from mpq_plugins.costs.budgets import Budgets, as_budgets
from mpq_plugins.errors import BudgetError, InfeasibleBudgetError
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.space.space import Space, Unit


@dataclass(frozen=True, eq=False)
class Limit:
    """One row of the problem: `cost` of every choice, and the most their sum may be."""

    name: str
    unit: str
    cost: np.ndarray  # [choice of all units]
    limit: float


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one choice per unit: minimise the summed loss subject to every limit.

    The choices of all units stand in one row: those of unit u are `start[u]:start[u + 1]`. Units of one `group` must choose
    choices of the same `label` (units that read one quantized activation must agree on its bits). `pairwise`
    [choice, choice] adds x'Px / 2 to the loss; it is symmetric, and zero when None.
    """

    units: tuple[str, ...]
    choices: tuple[str, ...]  # [choice of all units], for messages
    start: np.ndarray  # [unit + 1]
    loss: np.ndarray  # [choice of all units]
    limits: tuple[Limit, ...]
    group: np.ndarray  # [unit]
    label: np.ndarray  # [choice of all units]
    pairwise: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        loss: Sequence[Sequence[float]],
        costs: Sequence[tuple[Sequence[Sequence[float]], float]] = (),
        *,
        group: Sequence[int] | None = None,
        label: Sequence[Sequence[int]] | None = None,
    ) -> Problem:
        """A problem from nested lists `[unit][choice]`, `costs` being (table, limit) pairs."""
        sizes = [len(row) for row in loss]

        def flat(table: Sequence[Sequence[float]]) -> np.ndarray:
            return np.concatenate([np.asarray(row, dtype=float) for row in table]) if sizes else np.zeros(0)

        start = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        n_units, n_choices = len(sizes), int(start[-1])
        return cls(
            units=tuple(f"unit{index}" for index in range(n_units)),
            choices=tuple(str(index) for size in sizes for index in range(size)),
            start=start,
            loss=flat(loss),
            limits=tuple(Limit(f"cost{row}", "", flat(table), float(limit)) for row, (table, limit) in enumerate(costs)),
            group=np.arange(n_units) if group is None else np.asarray(group, dtype=int),
            label=np.zeros(n_choices, dtype=int) if label is None else flat(label).astype(int),
        )

    @property
    def n_units(self) -> int:
        """How many decisions there are."""
        return len(self.units)

    @cached_property
    def unit_of(self) -> np.ndarray:  # [choice of all units]
        """Unit of every choice."""
        return np.repeat(np.arange(self.n_units), np.diff(self.start))

    @cached_property
    def is_linked(self) -> bool:
        """Whether some group of several units has more than one label to agree on."""
        groups, units_of_group = np.unique(self.group, return_counts=True)
        if len(groups) == self.n_units:
            return False
        pairs = np.unique(np.stack([self.group[self.unit_of], self.label], axis=1), axis=0)
        labels_of_group = np.bincount(np.searchsorted(groups, pairs[:, 0]))
        return bool(np.any((labels_of_group > 1) & (units_of_group > 1)))

    def columns(self, choice: Sequence[int] | np.ndarray) -> np.ndarray:  # [unit]
        """Positions in the row of all choices, for one choice index per unit."""
        columns: np.ndarray = self.start[:-1] + np.asarray(choice, dtype=int)
        return columns

    def objective(self, choice: Sequence[int] | np.ndarray) -> float:
        """The loss of one choice index per unit, from the tables."""
        columns = self.columns(choice)
        linear = float(np.sum(self.loss[columns]))
        if self.pairwise is None:
            return linear
        return linear + 0.5 * float(self.pairwise[np.ix_(columns, columns)].sum())

    def usage(self, choice: Sequence[int] | np.ndarray) -> tuple[float, ...]:
        """What one choice index per unit costs, for each limit."""
        columns = self.columns(choice)
        return tuple(float(np.sum(limit.cost[columns])) for limit in self.limits)

    def agrees(self, choice: Sequence[int] | np.ndarray) -> bool:
        """Whether all units of each group choose the same label."""
        label_of_group: dict[int, int] = {}
        labels = self.label[self.columns(choice)]
        return all(label_of_group.setdefault(int(g), int(v)) == v for g, v in zip(self.group, labels, strict=True))

    def is_feasible(self, choice: Sequence[int] | np.ndarray) -> bool:
        """Whether the choice agrees within groups and meets every limit (to one part in 1e12, for rounding)."""
        meets = (used <= row.limit * (1 + 1e-12) for used, row in zip(self.usage(choice), self.limits, strict=True))
        return self.agrees(choice) and all(meets)


def build_problem(scores: Scores, budgets: Budgets = ()) -> Problem:
    """Tables of the scores and of every budget.

    A budget of a "max" cost drops the choices above it; a budget of a "sum" cost becomes a limit.
    Raises `InfeasibleBudgetError` as `check_reachable` does.
    """
    space, budgets = scores.space, as_budgets(budgets, at_least=0)
    tables = _checked_tables(space, budgets)
    limits = [budget.resolve(space) for budget in budgets]
    kept = np.concatenate(_within_peaks(space, budgets, limits, tables))
    start = np.concatenate([[0], np.cumsum([len(unit.choices) for unit in space.units])])
    choices = [choice for unit in space.units for choice in unit.choices]
    return Problem(
        units=tuple(unit.name for unit in space.units),
        choices=tuple(str(choices[column]) for column in np.flatnonzero(kept)),
        start=np.concatenate([[0], np.cumsum(kept)])[start],
        loss=np.concatenate([np.asarray(row, dtype=float) for row in scores.loss])[kept],
        limits=tuple(
            Limit(budget.cost.name, budget.cost.unit, np.concatenate(table)[kept], limit)
            for budget, limit, table in zip(budgets, limits, tables, strict=True)
            if budget.cost.reduce == "sum"
        ),
        group=np.asarray([unit.activation_group for unit in space.units], dtype=int),
        label=np.asarray([choice.activation for choice in choices], dtype=int)[kept],
        pairwise=None if scores.pairwise is None else scores.pairwise[np.ix_(kept, kept)],
    )


def check_reachable(space: Space, budgets: Budgets) -> None:
    """Refuse budgets that no choice can meet, before any forward pass.

    Raises `InfeasibleBudgetError` with the least that can be reached and the layers that hold most of it.
    Budgets are checked one by one here; whether they can be met together is the solver's to find out.
    """
    _checked_tables(space, as_budgets(budgets))


Table = list[np.ndarray]  # [unit][choice]


def _checked_tables(space: Space, budgets: Sequence[Budget]) -> list[Table]:
    names = [budget.cost.name for budget in budgets]
    if len(set(names)) < len(names):
        raise BudgetError(f"the same cost has two budgets: {names}. Keep the smaller one.")
    tables = [[_costs(space, unit, budget) for unit in space.units] for budget in budgets]
    for budget, table in zip(budgets, tables, strict=True):
        limit = budget.resolve(space)
        least = _least(space, table, sum if budget.cost.reduce == "sum" else max)
        total = sum(least.values()) if budget.cost.reduce == "sum" else max(least.values())
        if total > limit * (1 + 1e-12):
            raise InfeasibleBudgetError(_infeasible_text(space, budget, limit, total, least))
    return tables


def _costs(space: Space, unit: Unit, budget: Budget) -> np.ndarray:  # [choice of the unit]
    layers = [space.layer(name) for name in unit.layers]
    rows = [[cost_of(budget.cost, layer, choice) for layer in layers] for choice in unit.choices]
    return np.asarray([sum(row) if budget.cost.reduce == "sum" else max(row) for row in rows], dtype=float)


def _least(space: Space, table: Table, reduce: Callable[[Iterable[float]], float]) -> dict[int, float]:
    """Least cost of each unit, over the labels its activation group can agree on."""
    members: dict[int, list[int]] = {}
    for index, unit in enumerate(space.units):
        members.setdefault(unit.activation_group, []).append(index)
    least: dict[int, float] = {}
    for units in members.values():
        by_label = [_least_of_labels(space.units[u], table[u]) for u in units]
        common = sorted(set(by_label[0]).intersection(*by_label[1:]))
        options = [[labels[label] for labels in by_label] for label in common]
        least.update(zip(units, min(options, key=reduce), strict=True))
    return least


def _least_of_labels(unit: Unit, costs: np.ndarray) -> dict[int, float]:
    least: dict[int, float] = {}
    for choice, cost in zip(unit.choices, costs.tolist(), strict=True):
        least[choice.activation] = min(cost, least.get(choice.activation, cost))
    return least


def _within_peaks(
    space: Space, budgets: Sequence[Budget], limits: Sequence[float], tables: Sequence[Table]
) -> list[np.ndarray]:  # [unit][choice]
    """Which choices of every unit meet every "max" budget."""
    kept = [np.ones(len(unit.choices), dtype=bool) for unit in space.units]
    for budget, limit, table in zip(budgets, limits, tables, strict=True):
        if budget.cost.reduce == "max":
            kept = [within & (costs <= limit * (1 + 1e-12)) for within, costs in zip(kept, table, strict=True)]
    for unit, within in zip(space.units, kept, strict=True):
        if not within.any():
            peaks = ", ".join(budget.cost.name for budget in budgets if budget.cost.reduce == "max")
            raise InfeasibleBudgetError(f"no choice of {unit.name} meets the limits on {peaks} together. Raise one of them.")
    return kept


def _infeasible_text(space: Space, budget: Budget, limit: float, total: float, least: dict[int, float]) -> str:
    unit_name = budget.cost.unit
    largest = sorted(least, key=lambda u: -least[u])[:3]
    held = ", ".join(f"{space.units[u].name} ({format_amount(least[u], unit_name)})" for u in largest)
    pinned = f" Pinned: {', '.join(space.pins)}." if space.pins else ""
    return (
        f"{budget.cost.name} <= {format_amount(limit, unit_name)} cannot be met: the least is "
        f"{format_amount(total, unit_name)}.{pinned} Raise the limit, or allow lower bits or fewer pins for: {held}."
    )
