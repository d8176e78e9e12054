"""The certificate of an allocation in words."""

from __future__ import annotations

from collections.abc import Sequence

from mpq_plugins.allocation import Allocation
from mpq_plugins.costs import WeightSize
from mpq_plugins.costs.base import Budget, format_amount

_MUCH = 0.1  # share of a budget whose disuse is worth a note


def certificate_lines(allocation: Allocation, budgets: Sequence[Budget], *, top_k: int = 1) -> list[str]:
    """What is proven of an allocation, what of each budget is used, and what was measured, a sentence a line.

    `top_k` is how many plans were asked to be measured.
    """
    solution, space = allocation.solution, allocation.space
    was_replaced = allocation.selection is not None and allocation.selection.kept > 0
    told = solution.advice if was_replaced else solution.status.value
    lines = [f"{solution.solver}: {told}; loss {solution.objective:.6g}, gap {solution.gap:.1e}"]
    rows = [budget for budget in budgets if budget.cost.reduce == "sum"]
    if _wants_less(allocation, rows):
        lines.append(
            "note: much of every budget is unused, since by this score wider choices would not lower the loss. "
            "Few images can say so by chance: use more, or --proxy-option loss=kl where the score has it"
        )
    # A quadratic program that was not relaxed has no prices.
    prices = solution.shadow_prices or (None,) * len(rows)
    for budget, used, unused, price in zip(rows, solution.usage, solution.unused, prices, strict=True):
        limit = budget.resolve(space)
        saved = "" if price is None else f"; 1 % more would save {price * 0.01 * limit:.3g} of the loss"
        lines.append(
            f"{budget.cost.name}: {format_amount(used, budget.cost.unit)} of {format_amount(limit, budget.cost.unit)}, "
            f"{format_amount(unused, budget.cost.unit)} unused{saved}"
        )
        if isinstance(budget.cost, WeightSize):
            asked = f"{budget.limit} is " if isinstance(budget.limit, str) else ""
            lines.append(f"  {asked}room for weight bits on average: {space.average_bits_of_size(limit)}")
    lines.append(f"weight bits on average: {allocation.average_bits}")
    if allocation.selection is not None:
        measured, kept = allocation.selection.measured, allocation.selection.kept
        lines.append(
            f"measured loss of the best {len(measured)} plans: {min(measured):.6g} to {max(measured):.6g}; kept number "
            f"{kept + 1}, {allocation.selection.gain:.3g} below the first"
        )
        if len(measured) < top_k:
            lines.append(f"note: {top_k} plans were asked for, and the solver lists {len(measured)}")
    elif solution.next_best:
        runner_up = solution.next_best[0]
        lines.append(f"next-best plan: loss {runner_up.objective:.6g}")
    return lines


def _wants_less(allocation: Allocation, rows: Sequence[Budget]) -> bool:
    """Whether no budget binds although some unit could be wider."""
    solution, space = allocation.solution, allocation.space
    could_widen = any(allocation.bits[unit.layers[0]] != max(unit.choices) for unit in space.units)
    left = zip(rows, solution.unused, solution.shadow_prices, strict=False)
    loose = [price == 0 and unused > _MUCH * budget.resolve(space) for budget, unused, price in left]
    return could_widen and bool(loose) and all(loose)
