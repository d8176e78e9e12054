"""Surrogate proposes, true loss selects: the best plans of a score, measured, and the best of those kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Plan, Solution, Status
from mpq_plugins.space.precision import Precision
from mpq_plugins.space.space import Space

Measure = Callable[[Sequence[Sequence[int]]], Sequence[float]]
"""Takes plans, each one choice index per unit of the space; gives their true losses."""


@dataclass(frozen=True)
class Selection:
    """The true losses of the plans that a score proposed, best by the score first, and the position of the one kept."""

    measured: tuple[float, ...]  # [plan]
    kept: int

    @property
    def gain(self) -> float:
        """What the true loss of the kept plan is below that of the plan that the score likes best; never negative."""
        return self.measured[0] - self.measured[self.kept]

    def to_json(self) -> dict[str, Any]:
        """The selection as plain JSON values."""
        return {"measured": list(self.measured), "kept": self.kept, "gain": self.gain}


def select_plan(problem: Problem, space: Space, solution: Solution, measure: Measure) -> tuple[Solution, Selection]:
    """Measure `solution` and its next-best plans, and keep the plan of least true loss; ties go to the score.

    The returned solution is that plan with the bound of the score's program, hence an honest gap.
    """
    plans = [Plan(solution.choice, solution.objective), *solution.next_best]
    measured = tuple(map(float, measure([in_space(problem, space, plan.choice) for plan in plans])))
    kept = min(range(len(plans)), key=measured.__getitem__)
    selection = Selection(measured, kept)
    if kept == 0:
        return solution, selection
    chosen = plans[kept]
    usage = problem.usage(chosen.choice)
    return (
        replace(
            solution,
            status=Status.feasible,
            choice=chosen.choice,
            objective=chosen.objective,
            usage=usage,
            unused=tuple(limit.limit - used for limit, used in zip(problem.limits, usage, strict=True)),
            next_best=tuple(plan for plan in plans if plan is not chosen),
            advice=f"the plan of least measured loss among the best {len(plans)} of the score",
        ),
        selection,
    )


def in_space(problem: Problem, space: Space, choice: Sequence[int]) -> list[int]:
    """Choice indices of the space: the problem may have dropped choices above a peak limit."""
    precisions = [Precision.parse(problem.choices[column]) for column in problem.columns(choice)]
    return [unit.choices.index(precision) for unit, precision in zip(space.units, precisions, strict=True)]
