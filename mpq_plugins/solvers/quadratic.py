"""A problem with pairwise losses, in the order that clusters, widths and units stand together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mpq_plugins.solvers.blocks import Blocks, almost
from mpq_plugins.solvers.problem import Problem


@dataclass(frozen=True)
class Quadratic:
    """Minimise loss'x + x'Px / 2 over one-hot x that agree within clusters and meet the limits.

    Only the choices in `columns` are open, sorted by cluster, width and unit: the choices of one unit with one width (a slot)
    stand together, and so do the slots that a cluster takes with one width (an option). Widths that some unit of a cluster
    lacks are left out.
    """

    problem: Problem
    columns: np.ndarray  # [open], positions in the row of all choices
    slot_start: np.ndarray  # [slot], first column
    option_start: np.ndarray  # [option], first slot
    cluster_start: np.ndarray  # [cluster], first option

    @classmethod
    def of(cls, problem: Problem) -> Quadratic:
        """All choices that agree with some choice of every other unit of their cluster."""
        blocks = Blocks.of(problem)
        slots, positions = np.nonzero(blocks.index >= 0)
        columns = problem.start[blocks.unit[slots]] + blocks.index[slots, positions]
        option = blocks.option[slots]
        order = np.lexsort((columns, blocks.unit[slots], option, blocks.cluster[option]))
        return cls._sorted(problem, columns[order], slots[order], option[order], blocks.cluster[option[order]])

    @classmethod
    def _sorted(
        cls, problem: Problem, columns: np.ndarray, slot: np.ndarray, option: np.ndarray, cluster: np.ndarray
    ) -> Quadratic:
        """Of sorted columns, with the slot, the option and the cluster of each."""
        starts = _first(slot)
        option_start = _first(option[starts])
        return cls(problem, columns, starts, option_start, _first(cluster[starts[option_start]]))

    def restricted(self, kept: np.ndarray) -> Quadratic:
        """The same with only the columns in `kept` [open]; an option that lost all choices of one unit goes as a whole."""
        while True:
            lacking = ~np.logical_or.reduceat(kept, self.slot_start)
            torn = np.logical_or.reduceat(lacking, self.option_start)[self.option_of_slot][self.slot_of]
            if not np.any(torn & kept):
                break
            kept = kept & ~torn
        slots = self.slot_of[kept]
        options = self.option_of_slot[slots]
        return self._sorted(self.problem, self.columns[kept], slots, options, self.cluster_of_option[options])

    @cached_property
    def slot_of(self) -> np.ndarray:  # [open]
        """Slot of every column."""
        return _index(self.slot_start, len(self.columns))

    @cached_property
    def option_of_slot(self) -> np.ndarray:  # [slot]
        """Option of every slot."""
        return _index(self.option_start, len(self.slot_start))

    @cached_property
    def cluster_of_option(self) -> np.ndarray:  # [option]
        """Cluster of every option."""
        return _index(self.cluster_start, len(self.option_start))

    @cached_property
    def unit_of(self) -> np.ndarray:  # [open]
        """Unit of every column."""
        units: np.ndarray = self.problem.unit_of[self.columns]
        return units

    @cached_property
    def is_linked(self) -> bool:
        """Whether some cluster has several widths to agree on."""
        return len(self.cluster_start) < len(self.slot_start)

    @cached_property
    def loss(self) -> np.ndarray:  # [open]
        """Linear loss, with the diagonal of the pairwise loss: x_c^2 = x_c."""
        loss: np.ndarray = self.problem.loss[self.columns] + np.diag(self.own_blocks) / 2
        return loss

    @cached_property
    def own_blocks(self) -> np.ndarray:  # [open, open]
        """The pairwise loss as given, between choices of one unit too."""
        assert self.problem.pairwise is not None
        table = self.problem.pairwise[np.ix_(self.columns, self.columns)]
        symmetric: np.ndarray = (table + table.T) / 2
        return symmetric

    @cached_property
    def pairs(self) -> np.ndarray:  # [open, open]
        """The pairwise loss between different units."""
        return np.where(self.unit_of[:, None] == self.unit_of, 0.0, self.own_blocks)

    @cached_property
    def cost(self) -> np.ndarray:  # [limit, open]
        """Cost of every column."""
        return np.array([limit.cost[self.columns] for limit in self.problem.limits]).reshape(-1, len(self.columns))

    @cached_property
    def limits(self) -> np.ndarray:  # [limit]
        """The most of every cost, with a tenth less of the rounding that `Problem.is_feasible` forgives."""
        return almost(self.problem)

    def least(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # [node], [open, node]
        """Least sum of `values` [open, node] over plans that agree, and how much more a plan with each column has at least.

        Columns that are closed in a node have the value inf there.
        """
        in_slot = np.minimum.reduceat(values, self.slot_start, axis=0)
        if not self.is_linked:
            with np.errstate(invalid="ignore"):
                return in_slot.sum(axis=0), values - in_slot[self.slot_of]
        in_option = np.add.reduceat(in_slot, self.option_start, axis=0)
        in_cluster = np.minimum.reduceat(in_option, self.cluster_start, axis=0)
        with np.errstate(invalid="ignore"):
            more = (in_option - in_cluster[self.cluster_of_option])[self.option_of_slot] - in_slot
            return in_cluster.sum(axis=0), values + more[self.slot_of]

    def attaining(self, values: np.ndarray) -> np.ndarray:  # [unit of the open columns]
        """The columns whose `values` [open] sum up to the least, in order of slots."""
        in_slot = np.minimum.reduceat(values, self.slot_start)
        in_option = np.add.reduceat(in_slot, self.option_start)
        ends = np.append(self.cluster_start, len(in_option))
        options = [a + int(np.argmin(in_option[a:b])) for a, b in itertools.pairwise(ends.tolist())]
        return self.best_of(options, values)

    def best_of(self, options: Sequence[int] | np.ndarray, values: np.ndarray) -> np.ndarray:  # [unit of their clusters]
        """For every slot of some options, its column of least value."""
        slots = np.flatnonzero(np.isin(self.option_of_slot, options))
        stops = np.append(self.slot_start, len(values))
        return np.array([stops[slot] + int(np.argmin(values[stops[slot] : stops[slot + 1]])) for slot in slots])

    def positions(self, choice: Sequence[int]) -> np.ndarray:  # [unit]
        """Positions among the open columns of one choice index per unit, -1 where it is not open."""
        position = np.full(len(self.problem.loss), -1)
        position[self.columns] = np.arange(len(self.columns))
        taken: np.ndarray = position[self.problem.columns(choice)]
        return taken

    def choice(self, taken: np.ndarray) -> tuple[int, ...]:  # [unit]
        """Choice index of every unit, from positions [unit] or a mask [open] of the columns taken."""
        columns = self.columns[taken]
        chosen = np.empty(self.problem.n_units, dtype=int)
        units = self.problem.unit_of[columns]
        chosen[units] = columns - self.problem.start[units]
        return tuple(chosen.tolist())


def has_pairs(problem: Problem) -> bool:
    """Whether some pair of choices of different units has a loss of its own."""
    if problem.pairwise is None:
        return False
    other = problem.unit_of[:, None] != problem.unit_of
    return bool(np.any(problem.pairwise[other]))


def without_pairs(problem: Problem) -> Problem:
    """The linear problem that is left when choices of different units do not interact: x_c^2 = x_c."""
    if problem.pairwise is None:
        return problem
    return replace(problem, loss=problem.loss + np.diag(problem.pairwise) / 2, pairwise=None)


def _first(values: np.ndarray) -> np.ndarray:
    """Where runs of equal values begin."""
    return np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))


def _index(start: np.ndarray, length: int) -> np.ndarray:
    return np.repeat(np.arange(len(start)), np.diff(np.append(start, length)))
