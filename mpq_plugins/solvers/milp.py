"""A 0/1 program over what the Lagrangian bound leaves open: exact for any number of limits."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar, final

import numpy as np

from mpq_plugins.errors import SolverError
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.blocks import Blocks
from mpq_plugins.solvers.deadline import check_time_limit, is_over
from mpq_plugins.solvers.feasible_plans import good_plan
from mpq_plugins.solvers.lagrangian import Relaxation, relax
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.program import Backend, Outcome, Program
from mpq_plugins.solvers.solution import Solution, Status

_MOST_OVERSHOOTS = 20


@final
@dataclass(frozen=True)
class MILP(AbstractSolver):
    """Exact for any number of limits, through PuLP.

    `backend` is HiGHS where highspy is installed and else CBC ("auto"), or one of them by name. After `time_limit_s` of
    wall time the best plan so far is returned as feasible, with a bound that is still proven. `gap` is relative.
    """

    name: ClassVar[str] = "milp"

    time_limit_s: float = 60.0
    gap: float = 1e-9
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        check_time_limit(self.time_limit_s)

    def solve(self, problem: Problem) -> Solution:
        """The best plan, its bound, and the prices of the limits. Raises `SolverError` for pairwise losses."""
        if problem.pairwise is not None:
            raise SolverError("the 0/1 program takes no pairwise losses. Use Auto() or BranchAndBound().")
        deadline = time.perf_counter() + self.time_limit_s
        blocks = Blocks.of(problem)
        relaxation = relax(blocks, backend=self.backend)
        if relaxation.is_infeasible:
            return Solution(Status.infeasible, (), np.inf, np.inf, solver=self.name)
        known = good_plan(blocks, relaxation, deadline)
        loss = np.inf if known is None else problem.objective(known)
        prices = tuple(relaxation.prices.tolist())
        if known is not None and (loss - relaxation.value <= self.gap * abs(loss) or is_over(deadline)):
            status = Status.feasible if loss - relaxation.value > self.gap * abs(loss) else Status.optimal
            return Solution(status, _as_tuple(known), loss, relaxation.value, shadow_prices=prices, solver=self.name)
        outcome = best_within(blocks, relaxation, loss, backend=self.backend, deadline=deadline, gap=self.gap)
        bound = max(relaxation.value, min(outcome.bound, loss))
        if outcome.choice is not None and problem.objective(outcome.choice) <= loss:
            choice, status = outcome.choice, outcome.status
        elif known is not None:
            # Every plan below `loss` was open to the program: if there is none, the known plan is the best.
            choice, status = known, Status.optimal if outcome.status in _PROVEN else Status.feasible
        else:
            return Solution(outcome.status, (), np.inf, bound, solver=self.name, nodes=outcome.nodes)
        return Solution(
            status,
            _as_tuple(choice),
            problem.objective(choice),
            bound,
            shadow_prices=prices,
            solver=self.name,
            nodes=outcome.nodes,
        )


_PROVEN = (Status.optimal, Status.infeasible)


def best_within(
    blocks: Blocks,
    relaxation: Relaxation,
    loss: float,
    *,
    without: tuple[tuple[int, ...], ...] = (),
    backend: Backend = "auto",
    deadline: float,
    gap: float,
) -> Outcome:
    """The best plan other than the plans `without`, by a program of the choices that can reach a loss of `loss` or less."""
    minimum = blocks.minimum(relaxation.prices)
    stake = loss - relaxation.value
    rounding = 1e-9 * abs(stake) + 1e-13 * (abs(loss) + abs(relaxation.value)) if np.isfinite(loss) else 0.0
    kept = (blocks.reduced_costs(minimum, relaxation.prices) <= stake + rounding) & (blocks.index >= 0)
    program = Program(blocks, kept, minimum.choice, stake if np.isfinite(stake) else float(np.ptp(blocks.problem.loss)))
    cut_off = list(without)
    for _ in range(_MOST_OVERSHOOTS):
        outcome = program.best(without=cut_off, backend=backend, deadline=deadline, gap=gap)
        if outcome.choice is None or blocks.problem.is_feasible(outcome.choice):
            return outcome
        # A solver's row tolerance is wider than ours: cut this plan off and ask again.
        cut_off.append(_as_tuple(outcome.choice))
    return Outcome(Status.no_answer, outcome.bound, outcome.nodes)


def _as_tuple(choice: np.ndarray) -> tuple[int, ...]:
    return tuple(int(index) for index in choice)
