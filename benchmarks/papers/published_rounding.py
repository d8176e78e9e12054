"""The published way: a linear program in continuous bit-widths, then rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import numpy as np

from mpq_plugins.errors import PrecisionError, SolverError
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.blocks import Blocks
from mpq_plugins.solvers.feasible_plans import improved
from mpq_plugins.solvers.lagrangian import Relaxation, relax
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Solution, Status
from mpq_plugins.space.precision import Precision

_MOST_FILLED = 20  # 2 ** 20 ways to fill are the most that the published recursion could walk


@final
@dataclass(frozen=True)
class PublishedRounding(AbstractSolver):
    """OMPQ's allocation, for comparison: the relaxation is solved exactly, its bit-widths are rounded as published.

    The relaxation mixes two choices of a unit, which is a continuous bit-width; `bound` is its value. `rounding` is "fill",
    the published depth-first search for the widths next to the continuous ones that use most of what the relaxation uses
    (it ignores the losses), or "nearest", half to even, which may end above the limit. Such an answer has
    `Status.over_budget`, unless `repair` lowers the widths that lose least until the limit is met. Needs one limit and
    choices named by their bits, such as w4a8. Source: arXiv 2109.07865, section 3.3, and its published code.
    """

    name: ClassVar[str] = "published-rounding"

    rounding: Literal["fill", "nearest"] = "fill"
    repair: bool = False

    def solve(self, problem: Problem) -> Solution:
        """The rounded plan with the relaxation's bound. Raises `SolverError` for a problem that has no published form."""
        _check_form(problem)
        bits = _bits(problem)
        blocks = Blocks.of(problem)
        relaxation = relax(blocks)
        mixed = _continuous_bits(problem, blocks, relaxation, bits)
        choice = _filled(problem, blocks, mixed, bits) if self.rounding == "fill" else _nearest(problem, mixed, bits)
        if self.repair and not problem.is_feasible(choice):
            choice = improved(blocks, _lowered(problem, choice))
        return Solution(
            Status.feasible if problem.is_feasible(choice) else Status.over_budget,
            tuple(choice.tolist()),
            problem.objective(choice),
            relaxation.value,
            shadow_prices=tuple(relaxation.prices.tolist()),
            solver=f"{self.name} ({self.rounding}{', repaired' if self.repair else ''})",
            advice=_advice(problem, choice),
        )


def _check_form(problem: Problem) -> None:
    if len(problem.limits) != 1 or problem.pairwise is not None or problem.is_linked:
        raise SolverError(
            "the published form has one limit, no pairwise losses and no shared activation bits; this problem has "
            f"{', '.join(_unfit(problem))}. Use Auto()."
        )


def _unfit(problem: Problem) -> Iterator[str]:
    if len(problem.limits) != 1:
        yield f"{len(problem.limits)} limits"
    if problem.pairwise is not None:
        yield "pairwise losses"
    if problem.is_linked:
        yield "shared activation bits"


def _bits(problem: Problem) -> np.ndarray:  # [choice of all units]
    try:
        bits = np.array([Precision.parse(name).weight for name in problem.choices])
    except PrecisionError as error:
        raise SolverError(f"the published form rounds bit-widths, but {error} Use Auto().") from error
    same_unit = np.diff(problem.unit_of) == 0
    if np.any(np.diff(bits)[same_unit] <= 0):
        raise SolverError(
            "the published form decides weight bits alone, in ascending order; some unit also has a choice of activation bits. "
            "Give one activation width per unit, or use Auto()."
        )
    return bits


def _continuous_bits(problem: Problem, blocks: Blocks, relaxation: Relaxation, bits: np.ndarray) -> np.ndarray:  # [unit]
    """Bit-widths of a corner of the relaxation: units move from its cheap to its rich minimum in order, the last in part."""
    cheap, rich = problem.columns(relaxation.cheap.choice), problem.columns(relaxation.rich.choice)
    cost = problem.limits[0].cost
    left = problem.limits[0].limit - float(cost[cheap].sum())
    extra = cost[rich] - cost[cheap]
    before = np.concatenate([[0.0], np.cumsum(extra)[:-1]])
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(extra > 0, np.clip((left - before) / extra, 0.0, 1.0), 0.0)
    mixed: np.ndarray = bits[cheap] + share * (bits[rich] - bits[cheap])
    return mixed


def _neighbours(problem: Problem, mixed: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choice indices of the widths in the menu at or next below, and at or next above, the continuous ones."""
    menus = np.split(bits, problem.start[1:-1])
    below = [int(np.searchsorted(menu, width + 1e-9, side="right")) - 1 for menu, width in zip(menus, mixed, strict=True)]
    above = [int(np.searchsorted(menu, width - 1e-9, side="left")) for menu, width in zip(menus, mixed, strict=True)]
    return np.array(below), np.array(above)


def _filled(problem: Problem, blocks: Blocks, mixed: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Of the plans between `below` and `above`, the one that uses most within the limit; the last unit decides first."""
    below, above = _neighbours(problem, mixed, bits)
    open_units = np.flatnonzero(below != above)[::-1]
    if len(open_units) > _MOST_FILLED:
        raise SolverError(
            f"{len(open_units)} units lie between two widths, too many to fill depth first. Use rounding='nearest'."
        )
    best, most_used = below, -math.inf
    for code in range(2 ** len(open_units)):
        choice = above.copy()
        lowered = [unit for at, unit in enumerate(open_units) if code >> (len(open_units) - 1 - at) & 1]
        choice[lowered] = below[lowered]
        used = problem.usage(choice)[0]
        if used <= blocks.limits[0] and used > most_used:
            best, most_used = choice, used
    return best


def _nearest(problem: Problem, mixed: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """The width in the menu nearest to the continuous one, halves to the even width."""
    below, above = _neighbours(problem, mixed, bits)
    low, high = bits[problem.columns(below)], bits[problem.columns(above)]
    up = (high - mixed < mixed - low) | ((high - mixed == mixed - low) & (high % 2 == 0))
    return np.where(up, above, below)


def _lowered(problem: Problem, choice: np.ndarray) -> np.ndarray:
    """The plan with widths lowered one step at a time, where that loses least per unit of cost, until the limit is met."""
    choice = choice.copy()
    cost = problem.limits[0].cost
    while not problem.is_feasible(choice):
        units = np.flatnonzero(choice > 0)
        now = problem.columns(choice)[units]
        saved = cost[now] - cost[now - 1]
        lost = problem.loss[now - 1] - problem.loss[now]
        rate = np.where(saved > 0, lost / np.where(saved > 0, saved, 1.0), np.inf)
        choice[units[int(np.argmin(rate))]] -= 1
    return choice


def _advice(problem: Problem, choice: np.ndarray) -> str:
    limit, used = problem.limits[0], problem.usage(choice)[0]
    if problem.is_feasible(choice):
        return "rounded as published, not optimal: the gap bounds what an exact solver can still gain"
    return (
        f"the published rounding ends at {used / limit.limit:.4%} of the limit on {limit.name}. "
        "Use PublishedRounding(repair=True), rounding='fill', or an exact solver such as Auto()."
    )
