"""Values written as text on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mpq_plugins.errors import PluginError


def listed(words: Iterable[object], most: int = 3) -> str:
    """The first words joined by commas, and how many more there are."""
    found = list(map(str, words))
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def literal(text: str) -> Any:
    """A boolean, whole number, number or the text itself."""
    lowered = text.lower()
    if lowered in ("true", "false"):
        return lowered == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:  # also for thousands of digits
            continue
    return text


def words_of(texts: str | Iterable[str]) -> list[str]:
    """The words of a text, or of several, between commas."""
    texts = [texts] if isinstance(texts, str) else texts
    return [word.strip() for text in texts for word in str(text).split(",") if word.strip()]


def pairs_of(texts: str | Iterable[str]) -> dict[str, str]:
    """Texts `KEY=VALUE` as a dict; raises `PluginError`."""
    pairs = {}
    for text in [texts] if isinstance(texts, str) else texts:
        key, equals, value = str(text).partition("=")
        if not equals:
            raise PluginError(f"{text!r} must be KEY=VALUE.")
        pairs[key] = value
    return pairs


def values_of(texts: str | Iterable[str]) -> dict[str, Any]:
    """The same with values read by `literal`; dashes in keys become underscores."""
    return {key.replace("-", "_"): literal(value) for key, value in pairs_of(texts).items()}
