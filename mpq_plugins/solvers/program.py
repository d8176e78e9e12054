"""Linear and 0/1 programs through PuLP: HiGHS where highspy is installed, else the CBC that PuLP ships."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from mpq_plugins.errors import SolverError
from mpq_plugins.solvers.blocks import Blocks
from mpq_plugins.solvers.solution import Status

Backend = Literal["auto", "highs", "cbc"]
_STAKE = 1e4  # what the loss at stake is scaled to: the solvers' tolerances are absolute, 1e-6 or so
_LARGEST = 1e9
_ROW = 1e5
_CBC_INCREMENT = 2e-5  # CBC only accepts improvements above 1e-5.


@dataclass(frozen=True)
class Outcome:
    """How a program ended; `bound` is proven for its objective, or for all plans it may choose from, inf when there is none."""

    status: Status
    bound: float
    nodes: int = 0
    choice: np.ndarray | None = None  # [unit]


@dataclass(frozen=True)
class Program:
    """The 0/1 program of `blocks` over the choices in `kept`.

    Losses and costs enter as differences to the plan `reference`, which must be kept; units that keep one choice are left
    out. `stake` is how much loss can still be gained: it sets the scale of the objective.
    """

    blocks: Blocks
    kept: np.ndarray  # [slot, position]
    reference: np.ndarray  # [unit]
    stake: float

    def best(self, *, without: Sequence[Sequence[int]] = (), backend: Backend, deadline: float, gap: float) -> Outcome:
        """The plan of least loss that meets the limits and is none of `without`; what is found by `deadline`."""
        import pulp

        program = pulp.LpProblem("allocation", pulp.LpMinimize)
        slots, positions = self._free_columns()
        if not len(slots):
            return self._only_reference(without)
        index, units = self.blocks.index[slots, positions], self.blocks.unit[slots]
        loss = self.blocks.loss[slots, positions] - self._of_reference(self.blocks.problem.loss)[units]
        factor = self._factor(loss)
        picks = [pulp.LpVariable(f"x{column}", cat="Binary") for column in range(len(slots))]
        program += pulp.LpAffineExpression(terms(picks, loss * factor))
        self._add_choices(program, picks, slots)
        self._add_limits(program, picks, slots, positions)
        for plan in without:
            self._forbid(program, picks, units, index, np.asarray(plan))
        left = max(0.01, deadline - time.perf_counter())
        ended = run_program(program, backend, time_limit_s=left, gap=gap)
        bound = ended.bound / factor + float(self._of_reference(self.blocks.problem.loss).sum())
        if ended.status not in (Status.optimal, Status.feasible):
            return replace(ended, bound=bound)
        choice = self.reference.copy()
        taken = np.array([pick.value() or 0.0 for pick in picks]) > 0.5
        choice[units[taken]] = index[taken]
        return replace(ended, bound=bound, choice=choice)

    def _free_columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Slots and positions of the kept choices of every cluster that has something to decide."""
        cluster_of_slot = self.blocks.cluster[self.blocks.option]
        n_kept = np.bincount(cluster_of_slot, weights=self.kept.sum(axis=1), minlength=self.blocks.n_clusters)
        n_units = np.bincount(
            cluster_of_slot[np.unique(self.blocks.unit, return_index=True)[1]], minlength=self.blocks.n_clusters
        )
        slots, positions = np.nonzero(self.kept & (n_kept > n_units)[cluster_of_slot][:, None])
        return slots, positions

    def _only_reference(self, without: Sequence[Sequence[int]]) -> Outcome:
        """The outcome when every unit keeps one choice."""
        allowed = self.blocks.problem.is_feasible(self.reference) and tuple(self.reference.tolist()) not in without
        if not allowed:
            return Outcome(Status.infeasible, np.inf)
        return Outcome(Status.optimal, float(self._of_reference(self.blocks.problem.loss).sum()), choice=self.reference)

    def _of_reference(self, table: np.ndarray) -> np.ndarray:  # [unit]
        values: np.ndarray = table[self.blocks.problem.columns(self.reference)]
        return values

    def _factor(self, loss: np.ndarray) -> float:
        largest = float(np.abs(loss).max(initial=0.0))
        factor = _STAKE / self.stake if self.stake > 0 else np.inf
        factor = min(factor, _LARGEST / largest if largest > 0 else 1.0)
        return factor if np.isfinite(factor) else 1.0

    def _add_choices(self, program: Any, picks: Sequence[Any], slots: np.ndarray) -> None:
        """One choice for every unit; linked units agree through one variable for every width of their cluster."""
        import pulp

        options = self.blocks.option[slots]
        clusters = self.blocks.cluster[options]
        n_options = np.bincount(self.blocks.cluster)
        agree = {option: pulp.LpVariable(f"y{option}", cat="Binary") for option in np.unique(options[n_options[clusters] > 1])}
        for cluster in np.unique([self.blocks.cluster[option] for option in agree]):
            program += pulp.lpSum(agree[option] for option in agree if self.blocks.cluster[option] == cluster) == 1
        # All slots of an option, kept or not: an option that lost all choices of one unit is ruled out.
        for slot in np.flatnonzero(np.isin(self.blocks.option, options)).tolist():
            first, after = np.searchsorted(slots, [slot, slot + 1])
            program += pulp.lpSum(picks[first:after]) == agree.get(int(self.blocks.option[slot]), 1)

    def _add_limits(self, program: Any, picks: Sequence[Any], slots: np.ndarray, positions: np.ndarray) -> None:
        import pulp

        units = self.blocks.unit[slots]
        for row, limit in enumerate(self.blocks.problem.limits):
            base = self._of_reference(limit.cost)
            cost = self.blocks.cost[row, slots, positions] - base[units]
            left = float(self.blocks.limits[row] - base.sum())
            scale = _ROW / max(float(np.abs(cost).max(initial=0.0)), abs(left), 1e-300)
            program += pulp.LpAffineExpression(terms(picks, cost * scale)) <= left * scale

    def _forbid(self, program: Any, picks: Sequence[Any], units: np.ndarray, index: np.ndarray, plan: np.ndarray) -> None:
        """Cut off one plan, if it can be built from the kept choices."""
        import pulp

        free = np.unique(units)
        same = np.flatnonzero(index == plan[units])
        fixed = np.setdiff1d(np.arange(len(plan)), free)
        if len(same) == len(free) and np.array_equal(plan[fixed], self.reference[fixed]):
            program += pulp.lpSum(picks[column] for column in same.tolist()) <= len(free) - 1


def highest_point(
    heights: Sequence[float], slopes: Sequence[np.ndarray], most: np.ndarray, backend: Backend
) -> tuple[np.ndarray, float] | None:
    """The point of 0 <= prices <= most where the least of heights + slopes . prices is largest, and that height.

    None when the solver cannot tell, which happens where the numbers span too many magnitudes.
    """
    import pulp

    program = pulp.LpProblem("prices", pulp.LpMaximize)
    height = pulp.LpVariable("height")
    prices = [pulp.LpVariable(f"price{row}", 0, 1) for row in range(len(slopes[0]))]
    scale = float(np.abs(heights).max()) or 1.0
    program += height
    for value, slope in zip(heights, slopes, strict=True):
        gain = slope * (most / scale)
        unit = max(1.0, float(np.abs(gain).max()))
        program += height / unit - pulp.LpAffineExpression(terms(prices, gain / unit)) <= value / scale / unit
    ended = run_program(program, backend, time_limit_s=60.0, gap=0.0)
    if ended.status is not Status.optimal:
        return None
    point = np.clip([price.value() for price in prices], 0.0, 1.0) * most
    return point, float(height.value()) * scale


def run_program(program: Any, backend: Backend, *, time_limit_s: float, gap: float) -> Outcome:
    """Solve in silence. PuLP calls an answer that the clock cut off "Optimal"; only its solution status tells."""
    import pulp

    uses_highs = backend == "highs" or (backend == "auto" and importlib.util.find_spec("highspy") is not None)
    limit = time_limit_s if np.isfinite(time_limit_s) else None
    if uses_highs:
        solver = pulp.HiGHS(msg=False, timeLimit=limit, gapRel=gap, gapAbs=1e-6, parallel="off")
    else:
        solver = pulp.PULP_CBC_CMD(msg=False, timeLimit=limit, gapRel=gap)
    try:
        program.solve(solver)
    except pulp.PulpSolverError as error:
        raise SolverError(f"{solver.name} failed: {error}. Try backend='highs' (pip install highspy) or 'cbc'.") from error
    # For CBC's "Integer infeasible" PuLP sets this status and leaves the solution status at "none found".
    if pulp.LpStatusInfeasible in (program.status, program.sol_status):
        return Outcome(Status.infeasible, np.inf)
    status = {pulp.LpSolutionOptimal: Status.optimal, pulp.LpSolutionIntegerFeasible: Status.feasible}.get(
        program.sol_status, Status.no_answer
    )
    if uses_highs:
        info = program.solverModel.getInfo()
        return Outcome(status, float(info.mip_dual_bound), max(0, int(info.mip_node_count)))
    if status is Status.optimal:
        return Outcome(status, float(pulp.value(program.objective) or 0.0) - _CBC_INCREMENT)
    return Outcome(status, -np.inf)


def terms(variables: Sequence[Any], coefficients: np.ndarray) -> list[tuple[Any, float]]:
    """A linear expression without its zeros."""
    return [(variable, float(value)) for variable, value in zip(variables, coefficients, strict=True) if value]
