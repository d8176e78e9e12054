"""The answer to an allocation problem, as a certificate."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from mpq_plugins.common.html import html_table
from mpq_plugins.common.text import listed


class Status(enum.Enum):
    """How far an answer is proven; its value is the advice that goes with it."""

    optimal = "proven optimal within the gap"
    feasible = "feasible, not proven optimal: the gap bounds what is left; allow more time for a proof"
    infeasible = "no choice meets every limit: relax a budget"
    no_answer = "no feasible choice was found in time: allow more time or relax a budget"
    over_budget = "not an answer: the rounding ended above a limit; repair it or use an exact solver"


@dataclass(frozen=True)
class Plan:
    """One feasible choice per unit and its loss."""

    choice: tuple[int, ...]  # [unit]
    objective: float


@dataclass(frozen=True)
class Solution:
    """One choice per unit with what is known about it.

    `bound` is a proven lower bound of the loss, `gap` = (objective - bound) / max(|objective|, 1e-12) floored at 0.
    `usage` and `unused` have one number per limit, `shadow_prices` the loss saved per unit more of each limit (at the
    linear relaxation, or with pairwise losses at the convex one; never negative; empty where none was solved). `next_best`
    are other feasible plans, best first. For linear losses with one limit or none, and from `Exhaustive`, they are the exact
    ranking, empty where that would cost more than solving; with several limits the first are, and the best plans one or two
    changes away follow. With pairwise losses they are the best of the plans that the search met and of those one or two
    changes from its best ones: a better one may be missing. `advice` says what to do about an answer that is not optimal.
    `choice` is empty when there is none; with `Status.over_budget` it is the plan that breaks a limit.
    """

    status: Status
    choice: tuple[int, ...]  # [unit]
    objective: float
    bound: float
    usage: tuple[float, ...] = ()
    unused: tuple[float, ...] = ()
    shadow_prices: tuple[float, ...] = ()
    next_best: tuple[Plan, ...] = ()
    solver: str = ""
    seconds: float = 0.0
    nodes: int = 0
    advice: str = ""

    def __repr__(self) -> str:
        return "\n  ".join(f"{name}: {told}" for name, told in self._facts())

    def _repr_html_(self) -> str:
        return html_table("", ("", ""), self._facts())

    def _facts(self) -> list[tuple[str, str]]:
        """What is known of the answer, in a few lines."""
        by = f" by {self.solver}" if self.solver else ""
        loss = f"loss {self.objective:.6g}, bound {self.bound:.6g}, gap {self.gap:.1e}"
        facts = [("Solution", f"{self.status.name}{by}, {loss}, {self.seconds:.2g} s")]
        if self.choice:
            facts.append((f"choice of {len(self.choice)} units", listed(self.choice, 16)))
        limits = [f"{used:.6g} of {used + rest:.6g}" for used, rest in zip(self.usage, self.unused, strict=False)]
        return facts + [("used", listed(limits))] * bool(limits) + [("advice", self.advice)] * bool(self.advice)

    @property
    def has_plan(self) -> bool:
        """Whether `choice` meets every limit."""
        return self.status in (Status.optimal, Status.feasible)

    @property
    def gap(self) -> float:
        """Relative distance from the objective to its proven bound; inf when there is no plan."""
        if not self.has_plan:
            return math.inf
        return max(0.0, (self.objective - self.bound) / max(abs(self.objective), 1e-12))
