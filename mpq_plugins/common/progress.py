"""Progress of long work: silent until somebody asks to see it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import TypeVar

Item = TypeVar("Item")
Report = Callable[[int], None]
"""Takes the number of items done so far."""

Reporter = Callable[[str, "int | None"], "contextlib.AbstractContextManager[Report]"]
"""Takes a description and the number of items, None when unknown."""

_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


def track(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Every item of `items`, reporting how many are done to whoever watches (nobody by default).

    `total` is only needed for iterables without a length, or when fewer items than that will be taken.
    """
    reporter = _reporter.get()
    if reporter is None:
        yield from items
        return
    if total is None and isinstance(items, Sized):
        total = len(items)
    with reporter(description, total) as report:
        for n_done, item in enumerate(items, start=1):
            yield item
            report(n_done)


@contextlib.contextmanager
def reporting_to(reporter: Reporter | None) -> Iterator[None]:
    """Let `track` report to `reporter` for the time being."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextlib.contextmanager
def showing_progress() -> Iterator[None]:
    """Show a bar with the time left for everything that is tracked, on stderr; nothing when it is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    times = TimeElapsedColumn(), TimeRemainingColumn()
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *times
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        @contextlib.contextmanager
        def bar(description: str, total: int | None) -> Iterator[Report]:
            task = progress.add_task(description, total=total)
            try:
                yield lambda n_done: progress.update(task, completed=n_done)
            finally:
                progress.remove_task(task)

        with reporting_to(bar):
            yield
