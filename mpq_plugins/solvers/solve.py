"""Solving: the shared work around every solver."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np

from mpq_plugins.common.plugins import resolve
from mpq_plugins.errors import InfeasibleBudgetError, SolverError
from mpq_plugins.solvers.auto import Auto
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.blocks import Blocks
from mpq_plugins.solvers.lagrangian import relax
from mpq_plugins.solvers.milp import MILP
from mpq_plugins.solvers.problem import Problem, unreachable
from mpq_plugins.solvers.ranking import next_plans
from mpq_plugins.solvers.scaling import Scaling, spreads
from mpq_plugins.solvers.solution import Plan, Solution, Status

_ASYMMETRY = 1e-6  # of the largest pairwise loss: measured tables are symmetric to their own rounding
_CLOSED = 2e-6  # relative gap up to which an answer is called optimal


def solve(problem: Problem, solver: AbstractSolver | str | None = None, *, throw: bool = True, n_next: int = 3) -> Solution:
    """Find the best choice of every unit, as a certificate that is checked against the tables.

    Args:
        problem: losses and limits.
        solver: a name, class or object; `Auto` by default.
        throw: False returns an infeasible, missing or over-budget answer with its status and advice, instead of raising.
        n_next: how many next-best plans to list.

    Raises `InfeasibleBudgetError` when the limits cannot be met, and `SolverError` without a plan or with a wrong one.

    Example:
        >>> solution = mpq.solve(mpq.Problem.of([[0.0, 1.0], [0.0, 2.0]], [([[8, 4], [8, 4]], 12)]))
        >>> solution.choice, solution.objective, solution.status.name
        ((1, 0), 1.0, 'optimal')
    """
    started = time.perf_counter()
    solver = Auto() if solver is None else resolve("solvers", solver)
    _check_tables(problem)
    if problem.n_units == 0:
        limits = tuple(limit.limit for limit in problem.limits)
        nothing = (0.0,) * len(limits)
        return Solution(Status.optimal, (), 0.0, 0.0, nothing, limits, nothing, solver=solver.name)
    advice = _excluded(problem)
    if advice is None:
        scaling = Scaling.of(problem)
        answer = solver.solve(scaling.problem)
        solution = _certified(problem, scaling, answer, solver)
        if solution.has_plan and n_next:
            proven = solution.status is Status.optimal
            deadline = started + float(getattr(solver, "time_limit_s", math.inf))
            solution = replace(solution, next_best=_next_best(problem, scaling.problem, answer, proven, n_next, deadline))
    else:
        solution = Solution(Status.infeasible, (), math.inf, math.inf, solver=solver.name, advice=advice)
    solution = replace(solution, seconds=time.perf_counter() - started)
    if throw and not solution.has_plan:
        raise (InfeasibleBudgetError if solution.status is Status.infeasible else SolverError)(solution.advice)
    return solution


def _excluded(problem: Problem) -> str | None:
    """Why some unit has no choice, or some limit cannot be met on its own; None where neither is so."""
    for name, first, last in zip(problem.units, problem.start, problem.start[1:], strict=False):
        if first == last:
            return f"no choice of {name} meets the peak limits together. Raise one of them, or allow lower bits there."
    torn = sorted(set(range(problem.n_units)) - set(Blocks.of(problem).unit.tolist()))
    if torn:
        named = ", ".join(problem.units[u] for u in torn[:4])
        return f"{named} read one quantized activation and have no activation bits in common. Give them overlapping menus."
    return next(filter(None, (unreachable(problem, limit) for limit in problem.limits)), None)


def _certified(problem: Problem, scaling: Scaling, answer: Solution, solver: AbstractSolver) -> Solution:
    """The answer with everything recomputed that the tables can tell."""
    named = answer.solver or solver.name
    if not answer.choice:
        if answer.has_plan:
            raise SolverError(f"{named} says {answer.status.name} and gives no plan. Report it to the solver's authors.")
        late = f"{named} found no plan in its time limit. Raise its time_limit_s, relax a budget, or use another solver."
        advice = _not_together(problem) if answer.status is Status.infeasible else late
        return Solution(
            answer.status, (), math.inf, scaling.loss(answer.bound), solver=named, nodes=answer.nodes, advice=advice
        )
    _check_plan(problem, answer, named)
    prices, relaxed = _prices(scaling.problem, answer)
    objective, usage = problem.objective(answer.choice), problem.usage(answer.choice)
    solution = Solution(
        answer.status,
        answer.choice,
        objective,
        min(objective, scaling.loss(max(answer.bound, relaxed))),
        usage,
        tuple(limit.limit - used for limit, used in zip(problem.limits, usage, strict=True)),
        scaling.prices(prices),
        solver=named,
        nodes=answer.nodes,
        advice="" if answer.status is Status.optimal else answer.advice or answer.status.value,
    )
    if answer.status is Status.over_budget:
        return replace(solution, bound=scaling.loss(answer.bound))
    if answer.status is Status.optimal and not _is_closed(problem, scaling, solution):
        return replace(solution, status=Status.feasible, advice=Status.feasible.value)
    return solution


def _is_closed(problem: Problem, scaling: Scaling, solution: Solution) -> bool:
    """Whether the bound is close enough to call the plan optimal, in losses above the least of every unit or as they are."""
    left = solution.objective - solution.bound
    is_close = left <= _CLOSED * max(abs(solution.objective), abs(solution.objective - scaling.shift)) or left == 0
    return is_close and (problem.pairwise is None or _is_told(problem, problem.pairwise, solution.choice))


def _is_told(problem: Problem, pairwise: np.ndarray, choice: tuple[int, ...]) -> bool:
    """Whether the rounding of the sums is small beside what choices change: where large terms cancel, nothing is proven."""
    columns, starts = problem.columns(choice), problem.start[:-1]
    terms = np.abs(problem.loss[columns]).sum() + np.abs(pairwise[np.ix_(columns, columns)]).sum() / 2
    rounding = float(np.finfo(float).eps) * problem.n_units * float(terms)
    between = np.where(problem.unit_of[:, None] == problem.unit_of, 0.0, pairwise)
    most = np.maximum.reduceat(np.maximum.reduceat(between, starts, axis=0), starts, axis=1)
    least = np.minimum.reduceat(np.minimum.reduceat(between, starts, axis=0), starts, axis=1)
    at_stake = float(np.sum(spreads(problem.loss + np.diag(pairwise) / 2, starts)) + np.sum(most - least) / 2)
    return rounding <= _CLOSED * at_stake or at_stake == 0


def _check_plan(problem: Problem, answer: Solution, named: str) -> None:
    sizes = np.diff(problem.start)
    choice = answer.choice
    if len(choice) != problem.n_units or any(not 0 <= index < size for index, size in zip(choice, sizes, strict=False)):
        raise SolverError(f"{named} chose {choice}, which is not one choice for each of {problem.n_units} units.")
    if not problem.agrees(choice):
        raise SolverError(f"{named} chose {choice}, in which units of one activation group take different activation bits.")
    if answer.has_plan and not problem.is_feasible(choice):
        used = zip(problem.limits, problem.usage(choice), strict=True)
        over = [f"{limit.name} {amount:.17g} > {limit.limit:.17g}" for limit, amount in used if amount > limit.limit]
        raise SolverError(
            f"{named} says {answer.status.name}, but its plan breaks a limit: {'; '.join(over)}. Use another solver."
        )


def _prices(scaled: Problem, answer: Solution) -> tuple[tuple[float, ...], float]:
    """Shadow prices of the scaled problem, and the bound of its relaxation where it had to be solved for them."""
    if len(answer.shadow_prices) == len(scaled.limits) and scaled.limits:
        return answer.shadow_prices, -math.inf
    if scaled.pairwise is not None:
        return (), -math.inf
    relaxation = relax(Blocks.of(scaled))
    return tuple(relaxation.prices.tolist()), relaxation.value


def _next_best(
    problem: Problem, scaled: Problem, answer: Solution, proven: bool, n_next: int, deadline: float
) -> tuple[Plan, ...]:
    if answer.next_best:
        plans = [plan.choice for plan in answer.next_best if plan.choice != answer.choice]
    elif proven and scaled.pairwise is None:
        plans = next_plans(scaled, answer.choice, n_next, deadline=deadline)
    else:
        plans = []
    ranked = [Plan(plan, problem.objective(plan)) for plan in plans if problem.is_feasible(plan)]
    return tuple(sorted(ranked, key=lambda plan: plan.objective)[:n_next])


def _check_tables(problem: Problem) -> None:
    if not np.all(np.isfinite(problem.loss)):
        raise SolverError("the losses hold values that are not finite. Score again on finite data.")
    for limit in problem.limits:
        if not (np.all(np.isfinite(limit.cost)) and math.isfinite(limit.limit)):
            raise SolverError(
                f"the costs or the limit of {limit.name} are not finite. Check the cost's formula and the budget."
            )
    table = problem.pairwise
    if table is None:
        return
    if table.shape != (len(problem.loss), len(problem.loss)):
        raise SolverError(f"the pairwise losses have the shape {table.shape} for {len(problem.loss)} choices. Score again.")
    if not np.all(np.isfinite(table)):
        raise SolverError("the pairwise losses hold values that are not finite. Score again on finite data.")
    largest, apart = float(np.abs(table).max(initial=0.0)), float(np.abs(table - table.T).max(initial=0.0))
    if apart > _ASYMMETRY * largest:
        raise SolverError(
            f"the pairwise losses are not symmetric: entries differ by {apart:.3g}, the largest is {largest:.3g}. "
            "Use (table + table.T) / 2."
        )


def _not_together(problem: Problem) -> str:
    """Which limits exclude each other, and how far each would have to give way alone."""
    asked = " and ".join(map(str, problem.limits))
    least = []
    for row, limit in enumerate(problem.limits):
        others = problem.limits[:row] + problem.limits[row + 1 :]
        single = replace(problem, loss=limit.cost, limits=others, pairwise=None)
        best = solve(single, MILP(time_limit_s=1.0), throw=False, n_next=0)
        if best.status is Status.optimal:
            least.append(f"the least {limit.name} is {limit.amount(best.objective)}")
    within = f" With the other limits kept, {'; '.join(least)}." if least else ""
    return f"{asked} cannot be met together.{within} Relax one of them, or allow lower bits."
