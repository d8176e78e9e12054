"""The best plans around the best one, for problems whose exact ranking is out of reach."""

from __future__ import annotations

import numpy as np

from mpq_plugins.solvers.deadline import is_over
from mpq_plugins.solvers.iterated_search import Pool
from mpq_plugins.solvers.neighbourhood import TrackedPlan, cluster_moves, two_moves

MOST = 64  # plans listed
_CENTRES = 4  # best plans whose neighbours are listed


def nearby_plans(pool: Pool, deadline: float = np.inf) -> list[TrackedPlan]:
    """The best of the plans that the search met and of those one or two moves from the best of them; best first.

    After `deadline` only the best one, which there must be.
    """
    if is_over(deadline) and pool.best is not None:
        return [pool.best]
    wide = Pool(pool.quadratic)
    met = pool.plans()
    for plan in met:
        wide.add(plan)
    for centre in met[:_CENTRES]:
        for new in [] if is_over(deadline) else _neighbours(centre):
            if is_over(deadline):
                break
            wide.add(centre.moved(new))
    return wide.plans()[:MOST]


def _neighbours(plan: TrackedPlan) -> list[np.ndarray]:
    """Columns to take for the best feasible changes: the best single and double moves, and other widths of a cluster."""
    added, cost, same_width = plan.gains()
    within = same_width & np.all(cost <= (plan.quadratic.limits - plan.used)[:, None], axis=0)
    within[plan.taken] = False
    singles = np.flatnonzero(within)[np.argsort(added[within], kind="stable")[:MOST]]
    columns, both, allowed = two_moves(plan)
    first, second = np.nonzero(allowed)
    order = np.argsort(both[first, second], kind="stable")[:MOST]
    doubles = zip(columns[first[order]].tolist(), columns[second[order]].tolist(), strict=True)
    return [
        *(np.array([at]) for at in singles.tolist()),
        *(np.array(pair) for pair in doubles),
        *(new for new, _ in cluster_moves(plan)),
    ]
