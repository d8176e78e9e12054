"""The interface of a solver."""

from __future__ import annotations

import abc
from typing import ClassVar

from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Solution


class AbstractSolver(abc.ABC):
    """Finds the best choice of every unit. Implementations are frozen dataclasses of their options.

    Example:
        >>> import numpy as np
        >>> class Cheapest(mpq.AbstractSolver):
        ...     name = "cheapest"
        ...     def solve(self, problem):
        ...         choice = [int(row.argmin()) for row in np.split(problem.limits[0].cost, problem.start[1:-1])]
        ...         return mpq.Solution(mpq.Status.feasible, tuple(choice), problem.objective(choice), float("-inf"))
        >>> mpq.solve(mpq.Problem.of([[0, 1], [0, 2]], [([[3, 1], [3, 1]], 2)]), Cheapest()).choice
        (1, 1)
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """A plan with its status and a proven bound of the loss.

        `solve` hands over a scaled problem and recomputes the objective, the usage and the gap from its own tables. Leave
        `shadow_prices` and `next_best` empty to have them filled in. The limits of `problem` can be met one by one.
        """
