"""A 0/1 linear program with a variable for every pair of choices: for small problems that are not convex."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from mpq_plugins.solvers.answer import answer, infeasible, with_pairs
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.iterated_search import Pool, search
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.program import Backend, run_program, terms
from mpq_plugins.solvers.quadratic import Quadratic
from mpq_plugins.solvers.solution import Solution, Status
from mpq_plugins.solvers.time import check_time_limit, has_time_for
from mpq_plugins.solvers.tree import Tree

_STAKE = 1e4
_LARGEST = 1e9
_ROW = 1e5
_MOST_OVERSHOOTS = 20
_SECONDS_PER_PRODUCT = 3e-5  # to set the program up


@final
@dataclass(frozen=True)
class Linearized(AbstractSolver):
    """Exact for small problems with pairwise losses of any kind, through PuLP.

    A variable y for choices m of unit i and n of unit j with the rows sum_n y_(im,jn) = x_im of the reformulation-
    linearization technique (Adams and Sherali 1986), which bound far better than McCormick's. `backend` is as in `MILP`.
    After `time_limit_s` of wall time the best plan so far is returned as feasible. `gap` is relative.
    """

    name: ClassVar[str] = "linearized"

    time_limit_s: float = 60.0
    gap: float = 1e-6
    backend: Backend = "auto"
    kicks: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        check_time_limit(self.time_limit_s)

    def solve(self, problem: Problem) -> Solution:
        """The best plan and its bound, the prices of the convex relaxation, and plans around the best one."""
        started = time.perf_counter()
        deadline = started + self.time_limit_s
        quadratic = Quadratic.of(with_pairs(problem))
        pool, status = search(quadratic, kicks=self.kicks, seed=self.seed, deadline=started + self.time_limit_s / 3)
        if status is Status.infeasible:
            return infeasible(self.name)
        tree = Tree(quadratic, pool, self.gap, deadline)
        if not tree.may_begin:
            return answer(pool, self.name, bound=tree.bound, proven=False, prices=tree.prices, nodes=0, deadline=deadline)
        left = tree.open_choices(tree.root())
        if tree.is_closed:
            return answer(
                pool, self.name, bound=tree.bound, proven=True, prices=tree.prices, nodes=tree.nodes, deadline=deadline
            )
        bound, proven, nodes = self._search(left, pool, tree.bound, deadline)
        return answer(
            pool, self.name, bound=max(bound, tree.bound), proven=proven, prices=tree.prices, nodes=nodes, deadline=deadline
        )

    def _search(self, quadratic: Quadratic, pool: Pool, known: float, deadline: float) -> tuple[float, bool, int]:
        """Bound of the plans among the columns of `quadratic`, whether it is proven, and nodes; better plans go to `pool`."""
        overshoots: list[np.ndarray] = []
        bound, nodes = known, 0
        for _ in range(_MOST_OVERSHOOTS):
            n_products = len(quadratic.columns) ** 2 / 2  # at most
            if not has_time_for(deadline, _SECONDS_PER_PRODUCT * n_products):
                return min(bound, pool.best_loss), False, nodes
            program = _Program.of(quadratic, pool.best_loss - known)
            for taken in overshoots:
                program.forbid(taken)
            ended = run_program(
                program.program, self.backend, time_limit_s=max(0.01, deadline - time.perf_counter()), gap=self.gap / 2
            )
            bound, nodes = max(bound, program.loss(ended.bound)), nodes + ended.nodes
            if not ended.has_values:
                return min(bound, pool.best_loss), ended.status is Status.infeasible, nodes
            plan = pool.moved_to(quadratic, program.taken())
            if plan.is_feasible:
                pool.add(plan)
                return min(bound, pool.best_loss), ended.status is Status.optimal, nodes
            # A solver's row tolerance is wider than ours: cut this plan off and ask again.
            overshoots.append(program.taken())
        return bound, False, nodes


@dataclass(frozen=True)
class _Program:
    program: Any
    picks: list[Any]  # [open]
    quadratic: Quadratic
    factor: float

    @classmethod
    def of(cls, quadratic: Quadratic, stake: float) -> _Program:
        import pulp

        largest = max(float(np.abs(quadratic.pairs).max(initial=0.0)), float(np.abs(quadratic.loss).max(initial=0.0)))
        factor = min(_STAKE / stake if 0 < stake < np.inf else np.inf, _LARGEST / largest if largest > 0 else 1.0)
        program = pulp.LpProblem("pairs", pulp.LpMinimize)
        picks = [pulp.LpVariable(f"x{column}", cat="Binary") for column in range(len(quadratic.columns))]
        objective = terms(picks, quadratic.loss * factor)
        rows: list[Any] = []
        for first, second in itertools.combinations(_columns_of_units(quadratic), 2):
            block = quadratic.pairs[np.ix_(first, second)] * factor
            if block.any():
                both = [[pulp.LpVariable(f"y{m}_{n}", 0, 1) for n in second] for m in first]
                objective += [term for row, losses in zip(both, block, strict=True) for term in terms(row, losses)]
                rows += [pulp.lpSum(row) == picks[m] for row, m in zip(both, first, strict=True)]
                rows += [pulp.lpSum(column) == picks[n] for column, n in zip(zip(*both, strict=True), second, strict=True)]
        program += pulp.LpAffineExpression(objective)
        for row in [*rows, *_agreements(quadratic, picks), *_limits(quadratic, picks)]:
            program += row
        return cls(program, picks, quadratic, factor)

    def loss(self, value: float) -> float:
        """The loss of a value of the objective."""
        return value / self.factor

    def taken(self) -> np.ndarray:  # [unit]
        """The columns that the solution takes."""
        return np.flatnonzero(np.array([pick.value() or 0.0 for pick in self.picks]) > 0.5)

    def forbid(self, taken: np.ndarray) -> None:
        """Cut off one plan."""
        import pulp

        self.program.addConstraint(pulp.lpSum(self.picks[at] for at in taken.tolist()) <= len(taken) - 1)


def _columns_of_units(quadratic: Quadratic) -> list[list[int]]:
    return [np.flatnonzero(quadratic.unit_of == unit).tolist() for unit in range(quadratic.problem.n_units)]


def _agreements(quadratic: Quadratic, picks: list[Any]) -> list[Any]:
    """One choice for every unit, and of every label of a group as much in each of its units."""
    import pulp

    rows = [pulp.lpSum(picks[at] for at in columns) == 1 for columns in _columns_of_units(quadratic)]
    slots = np.split(np.arange(len(quadratic.columns)), quadratic.slot_start[1:])
    for first, last in zip(quadratic.option_start, np.append(quadratic.option_start[1:], len(slots)), strict=True):
        for slot in range(first + 1, last):
            rows.append(pulp.lpSum(picks[at] for at in slots[slot]) == pulp.lpSum(picks[at] for at in slots[first]))
    return rows


def _limits(quadratic: Quadratic, picks: list[Any]) -> list[Any]:
    import pulp

    scales = [_ROW / max(float(np.abs(cost).max(initial=0.0)), 1e-300) for cost in quadratic.cost]
    rows = zip(quadratic.cost, quadratic.limits, scales, strict=True)
    return [pulp.LpAffineExpression(terms(picks, cost * scale)) <= limit * scale for cost, limit, scale in rows]


def n_products(problem: Problem) -> int:
    """How many pairs of choices a linearized program has variables for: those of units that interact."""
    if problem.pairwise is None:
        return 0
    starts = problem.start[:-1]
    largest = np.maximum.reduceat(np.maximum.reduceat(np.abs(problem.pairwise), starts, axis=0), starts, axis=1)
    sizes = np.diff(problem.start)
    return int(np.triu((largest > 0) * np.outer(sizes, sizes), 1).sum())
