"""The Brevitas versions whose names this adapter knows."""

from __future__ import annotations

import importlib.metadata

from mpq_plugins.errors import AdapterError, MissingExtraError

LOWEST, BELOW = (0, 13), (0, 14)
_INSTALL = "Install it: pip install 'mpq-plugins[brevitas]'."


def require_brevitas() -> None:
    """Raise `MissingExtraError` without Brevitas and `AdapterError` for a version outside the tested range."""
    try:
        installed = importlib.metadata.version("brevitas")
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError(f"the Brevitas adapter needs brevitas, which is not installed. {_INSTALL}") from error
    if not LOWEST <= _major_minor(installed) < BELOW:
        raise AdapterError(
            f"brevitas {installed} is installed; this adapter knows brevitas >={_text(LOWEST)},<{_text(BELOW)}. "
            f"Install it: pip install 'brevitas>={_text(LOWEST)},<{_text(BELOW)}'."
        )


def _major_minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
