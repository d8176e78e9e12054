"""Solving: the shared work around every solver."""

from __future__ import annotations

import abc
from typing import ClassVar

from mpq_plugins._problem import Problem
from mpq_plugins._solution import Solution


class AbstractSolver(abc.ABC):
    """Finds the best choice of every unit. Implementations are frozen dataclasses of their options."""

    name: ClassVar[str]

    @abc.abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """A solution; totals in it are recomputed by `solve`."""


def solve(problem: Problem, solver: AbstractSolver | None = None, *, throw: bool = True) -> Solution:
    """To be filled."""
    raise NotImplementedError
