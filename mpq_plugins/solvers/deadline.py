"""Wall time: what a solver may be given, and when it is over."""

from __future__ import annotations

import time

from mpq_plugins.errors import SolverError


def check_time_limit(seconds: float) -> None:
    """Raise `SolverError` for a time limit that is 0, negative or not a number."""
    if not (isinstance(seconds, (int, float)) and seconds > 0):  # a comparison with NaN is False
        raise SolverError(f"time_limit_s is {seconds!r}, but must be above 0 seconds. Give such as 60, or inf for no limit.")


def is_over(deadline: float) -> bool:
    """Whether `deadline`, a value of `time.perf_counter`, has passed."""
    return time.perf_counter() > deadline
