"""Public names of a package that are imported on first use."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names (name -> module under `mpq_plugins`) cost nothing until used."""

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"mpq_plugins.{homes[name]}"), name)

    return find, lambda: sorted({*vars(importlib.import_module(package)), *homes})


def imported_names(file: str) -> dict[str, str]:
    """Name -> module under `mpq_plugins`, as a source file imports them for type checkers (`if TYPE_CHECKING:`) alone."""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    imports = [part for block in tree.body if isinstance(block, ast.If) for part in block.body]
    return {
        name.name: str(part.module).removeprefix("mpq_plugins.")
        for part in imports
        if isinstance(part, ast.ImportFrom)
        for name in part.names
    }
