"""Wall time: what a solver may be given, and when it is over."""

from __future__ import annotations

import time

from mpq_plugins.errors import SolverError

# Of dense linear algebra on n columns, as bounding a whole problem needs, per n^3: a guess for a slow core.
_SECONDS_PER_CUBE = 1.5e-9
_SLACK_S = 0.5  # what may be begun in spite of the limit


def check_time_limit(seconds: float) -> None:
    """Raise `SolverError` for a time limit that is 0, negative or not a number."""
    if not (isinstance(seconds, (int, float)) and seconds > 0):  # a comparison with NaN is False
        raise SolverError(f"time_limit_s is {seconds!r}, but must be above 0 seconds. Give such as 60, or inf for no limit.")


def is_over(deadline: float) -> bool:
    """Whether `deadline`, a value of `time.perf_counter`, has passed."""
    return time.perf_counter() > deadline


def has_time_for_algebra(deadline: float, n_columns: int) -> bool:
    """Whether dense linear algebra on so many columns is likely to end about in time."""
    return time.perf_counter() + _SECONDS_PER_CUBE * float(n_columns) ** 3 < deadline + _SLACK_S
