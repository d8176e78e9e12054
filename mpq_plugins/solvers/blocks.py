"""The Lagrangian view of a problem: without its limits it falls apart into one small choice per unit or per cluster."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mpq_plugins.solvers.problem import Problem


@dataclass(frozen=True)
class Minimum:
    """The least priced loss: one choice per unit, and the least value of every slot, option and cluster."""

    choice: np.ndarray  # [unit]
    loss: float
    usage: np.ndarray  # [limit]
    slot_value: np.ndarray  # [slot]
    option_value: np.ndarray  # [option]
    cluster_value: np.ndarray  # [cluster]


@dataclass(frozen=True)
class Blocks:
    """Tables of a problem, laid out so that the least priced loss is found without a loop over units.

    A slot holds the choices of one unit with one width, an option the slots that a cluster takes with one width. A unit that
    need not agree with others is a cluster of one option with one slot. Widths that some unit of a cluster lacks are left out.
    """

    problem: Problem
    loss: np.ndarray  # [slot, position], inf where a slot has fewer choices
    cost: np.ndarray  # [limit, slot, position]
    index: np.ndarray  # [slot, position], choice index within the unit, -1 where there is none
    unit: np.ndarray  # [slot]
    option: np.ndarray  # [slot]
    cluster: np.ndarray  # [option]
    options: np.ndarray  # [cluster, position], -1 where a cluster has fewer options
    is_linked: bool

    @classmethod
    def of(cls, problem: Problem) -> Blocks:
        """Lay out the tables of `problem`."""
        columns = np.flatnonzero(_allowed(problem))
        if not problem.is_linked:
            units = np.arange(problem.n_units)
            tables = _dense(problem, columns, problem.unit_of[columns])
            return cls(problem, *tables, units, units, units, units[:, None], False)
        _, cluster_of, sizes = np.unique(problem.cluster, return_inverse=True, return_counts=True)
        free = sizes[cluster_of] == 1
        cluster = np.where(free, -1 - np.arange(problem.n_units), problem.cluster)
        width = np.where(free[problem.unit_of], 0, problem.width)[columns]
        unit = problem.unit_of[columns]
        order = np.lexsort((width, unit))
        columns, width, unit = columns[order], width[order], unit[order]
        slots, slot_of = np.unique(np.stack([unit, width]), axis=1, return_inverse=True)
        options, option_of_slot = np.unique(np.stack([cluster[slots[0]], slots[1]]), axis=1, return_inverse=True)
        cluster_of_option = np.unique(options[0], return_inverse=True)[1]
        tables, option = _dense(problem, columns, slot_of.ravel()), option_of_slot.ravel()
        return cls(problem, *tables, slots[0], option, cluster_of_option, _padded_rows(cluster_of_option), True)

    @property
    def n_clusters(self) -> int:
        """How many independent decisions there are."""
        return len(self.options)

    @cached_property
    def limits(self) -> np.ndarray:  # [limit]
        """The most that may be used of every cost; see `almost`."""
        return almost(self.problem)

    def minimum(self, prices: np.ndarray, *, with_loss: bool = True) -> Minimum:
        """Least of loss + prices . cost (or of the costs alone) over plans that agree within clusters, limits left aside."""
        priced = self.priced(prices, with_loss=with_loss)
        position = np.argmin(priced, axis=1)
        slots = np.arange(len(priced))
        slot_value = priced[slots, position]
        if self.is_linked:
            option_value = np.bincount(self.option, weights=slot_value, minlength=len(self.cluster))
            table = np.where(self.options >= 0, option_value[self.options], np.inf)
            best = self.options[np.arange(self.n_clusters), np.argmin(table, axis=1)]
            cluster_value, slots = option_value[best], np.flatnonzero(best[self.cluster[self.option]] == self.option)
        else:
            option_value = cluster_value = slot_value
        chosen = position[slots]
        choice = np.empty(self.problem.n_units, dtype=int)
        choice[self.unit[slots]] = self.index[slots, chosen]
        loss = float(self.loss[slots, chosen].sum())
        return Minimum(choice, loss, self.cost[:, slots, chosen].sum(axis=1), slot_value, option_value, cluster_value)

    def priced(self, prices: np.ndarray, *, with_loss: bool = True) -> np.ndarray:  # [slot, position]
        """loss + prices . cost (or the costs alone), inf where there is no choice."""
        priced = self.loss if with_loss else np.where(self.index >= 0, 0.0, np.inf)
        for price, cost in zip(prices, self.cost, strict=True):
            if price:
                priced = priced + price * cost
        return priced

    def bound(self, minimum: Minimum, prices: np.ndarray) -> float:
        """Lower bound of the loss of every feasible plan, from the minimum at `prices`."""
        return minimum.loss + float(prices @ (minimum.usage - self.limits))

    def reduced_costs(self, minimum: Minimum, prices: np.ndarray) -> np.ndarray:  # [slot, position]
        """How much forcing a choice raises the bound, at the least; inf where there is no choice."""
        in_slot = self.priced(prices) - minimum.slot_value[:, None]
        in_cluster = minimum.option_value - minimum.cluster_value[self.cluster]
        costs: np.ndarray = np.maximum(in_slot, 0.0) + np.maximum(in_cluster, 0.0)[self.option][:, None]
        return costs


def almost(problem: Problem) -> np.ndarray:  # [limit]
    """The limits with the rounding that `Problem.is_feasible` forgives, less a tenth for sums taken in another order."""
    return np.array([row.limit * (1 + 0.9e-12) for row in problem.limits])


def _allowed(problem: Problem) -> np.ndarray:  # [choice of all units]
    """Which choices have a width that every unit of their cluster can take."""
    clusters, cluster_of, sizes = np.unique(problem.cluster, return_inverse=True, return_counts=True)
    if len(clusters) == problem.n_units:
        return np.ones(len(problem.loss), dtype=bool)
    pairs, pair_of = np.unique(np.stack([cluster_of[problem.unit_of], problem.width]), axis=1, return_inverse=True)
    units_with = np.bincount(np.unique(np.stack([pair_of.ravel(), problem.unit_of]), axis=1)[0])
    allowed: np.ndarray = (units_with == sizes[pairs[0]])[pair_of.ravel()]
    return allowed


def _dense(problem: Problem, columns: np.ndarray, slot_of: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, cost and choice index of `columns` (sorted by slot) as tables [slot, position]."""
    position, shape = _within(slot_of)
    loss, index = np.full(shape, np.inf), np.full(shape, -1)
    loss[slot_of, position] = problem.loss[columns]
    index[slot_of, position] = columns - problem.start[problem.unit_of[columns]]
    cost = np.zeros((len(problem.limits), *shape))
    for row, limit in enumerate(problem.limits):
        cost[row, slot_of, position] = limit.cost[columns]
    return loss, cost, index


def _padded_rows(cluster_of_option: np.ndarray) -> np.ndarray:  # [cluster, position]
    """The options of every cluster, -1 where a cluster has fewer than the largest."""
    order = np.argsort(cluster_of_option, kind="stable")
    position, shape = _within(cluster_of_option[order])
    rows = np.full(shape, -1)
    rows[cluster_of_option[order], position] = order
    return rows


def _within(group_of: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Positions within their groups of members sorted by group, and the shape of a table [group, position]."""
    counts = np.bincount(group_of)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
    return np.arange(len(group_of)) - first[group_of], (len(counts), int(counts.max(initial=0)))
