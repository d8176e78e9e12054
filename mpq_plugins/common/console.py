"""The terminal: text is printed as it is."""

from __future__ import annotations

import sys

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console that takes brackets and colons in names, formulas and paths for what they are, not for markup."""
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 140
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
