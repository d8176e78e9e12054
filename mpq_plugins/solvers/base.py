"""The interface of a solver."""

from __future__ import annotations

import abc
from typing import ClassVar

from mpq_plugins.common.plugins import Kind, Plugin
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Solution


class AbstractSolver(Plugin, abc.ABC):
    """Finds the best choice of every unit. Implementations are frozen dataclasses of their options.

    Example:
        >>> class Narrowest(mpq.AbstractSolver):
        ...     name = "narrowest"
        ...     def solve(self, problem):
        ...         choice = (0,) * problem.n_units
        ...         return mpq.Solution(mpq.Status.feasible, choice, problem.objective(choice), float("-inf"))
        >>> mpq.solve(mpq.Problem.of([[2, 1], [5, 2]], [([[1, 3], [1, 3]], 2)]), Narrowest()).objective
        7.0
    """

    plugin_kind: ClassVar[Kind] = "solvers"
    name: ClassVar[str]

    @abc.abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """A plan with its status and a proven bound of the loss.

        `solve` hands over a scaled problem and recomputes the objective, the usage and the gap from its own tables. Leave
        `shadow_prices` and `next_best` empty to have them filled in. The limits of `problem` can be met one by one.
        """
