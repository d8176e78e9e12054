"""Values written as text on the command line."""

from __future__ import annotations

from typing import Any


def literal(text: str) -> Any:
    """A boolean, whole number, number or the text itself."""
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
