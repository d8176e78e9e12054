"""The allocation problem as numbers: one choice per unit, least total loss, within every limit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from mpq_plugins.costs.base import Budget, cost_of, format_amount
from mpq_plugins.costs.budgets import Budgets, as_budgets
from mpq_plugins.errors import BudgetError, InfeasibleBudgetError
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.space.space import Space

_ROUNDING = 1e-12  # of a limit: sums that exceed it by less meet it


@dataclass(frozen=True, eq=False)
class Limit:
    """One row of the problem: `cost` of every choice, and the most their sum may be."""

    name: str
    unit: str
    cost: np.ndarray  # [choice of all units]
    limit: float

    def amount(self, value: float) -> str:
        """A cost in the unit of this limit, as people write it."""
        return format_amount(value, self.unit).strip()

    def __str__(self) -> str:
        return f"{self.name} <= {self.amount(self.limit)}"


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one choice per unit: minimise the summed loss subject to every limit.

    The choices of all units stand in one row: those of unit u are `start[u]:start[u + 1]`. Units of one `cluster` must choose
    choices of the same `width` (units that read one quantized activation must agree on its bits). `pairwise`
    [choice, choice] adds x'Px / 2 to the loss; it is symmetric, and zero when None.

    Example:
        >>> problem = mpq.Problem.of([[0.0, 1.0], [0.0, 2.0]], [([[8, 4], [8, 4]], 12)])
        >>> problem.objective((1, 0)), problem.usage((1, 0)), problem.is_feasible((0, 0))
        (1.0, (12.0,), False)
    """

    units: tuple[str, ...]
    choices: tuple[str, ...]  # [choice of all units], for messages
    start: np.ndarray  # [unit + 1]
    loss: np.ndarray  # [choice of all units]
    limits: tuple[Limit, ...]
    cluster: np.ndarray  # [unit]
    width: np.ndarray  # [choice of all units], of the activations that a cluster shares
    pairwise: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        loss: Sequence[Sequence[float]],
        costs: Sequence[tuple[Sequence[Sequence[float]], float]] = (),
        *,
        cluster: Sequence[int] | None = None,
        width: Sequence[Sequence[int]] | None = None,
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
            cluster=np.arange(n_units) if cluster is None else np.asarray(cluster, dtype=int),
            width=np.zeros(n_choices, dtype=int) if width is None else flat(width).astype(int),
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
        """Whether some cluster of several units has more than one width to agree on."""
        clusters, units_of_cluster = np.unique(self.cluster, return_counts=True)
        if len(clusters) == self.n_units:
            return False
        pairs = np.unique(np.stack([self.cluster[self.unit_of], self.width], axis=1), axis=0)
        widths_of_cluster = np.bincount(np.searchsorted(clusters, pairs[:, 0]))
        return bool(np.any((widths_of_cluster > 1) & (units_of_cluster > 1)))

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
        """Whether all units of each cluster choose the same width."""
        width_of_cluster: dict[int, int] = {}
        widths = self.width[self.columns(choice)]
        return all(width_of_cluster.setdefault(int(g), int(v)) == v for g, v in zip(self.cluster, widths, strict=True))

    def is_feasible(self, choice: Sequence[int] | np.ndarray) -> bool:
        """Whether the choice agrees within clusters and meets every limit (to one part in 1e12, for rounding)."""
        meets = (used <= row.limit * (1 + _ROUNDING) for used, row in zip(self.usage(choice), self.limits, strict=True))
        return self.agrees(choice) and all(meets)


def build_problem(scores: Scores, budgets: Budgets = ()) -> Problem:
    """Put the losses and costs of every choice into tables for a solver.

    Args:
        scores: the losses of every choice.
        budgets: a "sum" cost becomes a limit; a "max" cost drops the choices above it.

    Raises `InfeasibleBudgetError` as `check_reachable` does.

    Example:
        >>> space = mpq.build_space(torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.zeros(1, 16), choices=(2, 8))
        >>> print(mpq.build_problem(mpq.Scores(space, ((0.5, 0.1),), {"name": "mine"}), "size=w4").limits[0])
        size <= 64 B
    """
    budgets = as_budgets(budgets, at_least=0)
    whole = _without_losses(scores.space, budgets)
    is_peak = [budget.cost.reduce == "max" for budget in budgets]
    kept = np.ones(len(whole.loss), dtype=bool)
    for limit in itertools.compress(whole.limits, is_peak):
        kept &= limit.cost <= limit.limit * (1 + _ROUNDING)
    return replace(
        whole,
        choices=tuple(itertools.compress(whole.choices, kept)),
        start=np.concatenate([[0], np.cumsum(kept)])[whole.start],
        loss=np.concatenate([np.asarray(row, dtype=float) for row in scores.loss])[kept],
        limits=tuple(
            replace(limit, cost=limit.cost[kept]) for limit, peak in zip(whole.limits, is_peak, strict=True) if not peak
        ),
        width=whole.width[kept],
        pairwise=None if scores.pairwise is None else scores.pairwise[np.ix_(kept, kept)],
    )


def check_reachable(space: Space, budgets: Budgets) -> None:
    """Refuse budgets that no choice can meet, before any forward pass.

    Raises `InfeasibleBudgetError` with the least that can be reached and the layers that hold most of it.
    Budgets are checked one by one here; whether they can be met together is the solver's to find out.
    """
    _without_losses(space, as_budgets(budgets))


def unreachable(
    problem: Problem, limit: Limit, *, reduce: Literal["sum", "max"] = "sum", pins: Iterable[str] = ()
) -> str | None:
    """Why no plan meets `limit`, were it alone; None where one does."""
    least = _least_costs(problem, limit.cost, reduce)
    total = float(least.sum() if reduce == "sum" else least.max())
    if total <= limit.limit * (1 + _ROUNDING):
        return None
    largest = np.argsort(-least, kind="stable")[:3]
    held = ", ".join(f"{problem.units[u]} ({limit.amount(least[u])})" for u in largest)
    pinned = ", ".join(pins)
    told, fewer = (f" Pinned: {pinned}.", " or fewer pins") if pinned else ("", "")
    return (
        f"{limit} cannot be met: the least is {limit.amount(total)}.{told} "
        f"Raise the limit, or allow lower bits{fewer} for: {held}."
    )


def _without_losses(space: Space, budgets: Sequence[Budget]) -> Problem:
    """All choices of the space, with the costs and limits of all budgets, of "max" costs too."""
    names = [budget.cost.name for budget in budgets]
    if len(set(names)) < len(names):
        raise BudgetError(f"the same cost has two budgets: {names}. Keep the smaller one.")
    choices = [choice for unit in space.units for choice in unit.choices]
    problem = Problem(
        units=tuple(unit.name for unit in space.units),
        choices=tuple(map(str, choices)),
        start=np.cumsum([0, *(len(unit.choices) for unit in space.units)]),
        loss=np.zeros(len(choices)),
        limits=tuple(
            Limit(budget.cost.name, budget.cost.unit, _costs(space, budget), budget.resolve(space)) for budget in budgets
        ),
        cluster=np.asarray([unit.activation_group for unit in space.units], dtype=int),
        width=np.asarray([choice.activation for choice in choices], dtype=int),
    )
    for budget, limit in zip(budgets, problem.limits, strict=True):
        advice = unreachable(problem, limit, reduce=budget.cost.reduce, pins=space.pins)
        if advice is not None:
            raise InfeasibleBudgetError(advice)
    return problem


def _costs(space: Space, budget: Budget) -> np.ndarray:  # [choice of all units]
    reduce = sum if budget.cost.reduce == "sum" else max
    return np.array(
        [
            reduce([cost_of(budget.cost, space.layer(name), choice) for name in unit.layers])
            for unit in space.units
            for choice in unit.choices
        ],
        dtype=float,
    )


def _least_costs(problem: Problem, cost: np.ndarray, reduce: Literal["sum", "max"]) -> np.ndarray:  # [unit]
    """Least cost of each unit, at the width where its cluster costs least."""
    least: np.ndarray = np.minimum.reduceat(cost, problem.start[:-1])
    if not problem.is_linked:
        return least
    members: dict[int, list[int]] = {}
    for unit, cluster in enumerate(problem.cluster.tolist()):
        members.setdefault(cluster, []).append(unit)
    for units in (units for units in members.values() if len(units) > 1):
        by_width: list[dict[int, float]] = [{} for _ in units]
        for own, unit in zip(by_width, units, strict=True):
            columns = slice(problem.start[unit], problem.start[unit + 1])
            for width, value in zip(problem.width[columns].tolist(), cost[columns].tolist(), strict=True):
                own[width] = min(value, own.get(width, value))
        options = [[own[width] for own in by_width] for width in sorted(set(by_width[0]).intersection(*by_width))]
        least[units] = min(options, key=sum if reduce == "sum" else max)
    return least
