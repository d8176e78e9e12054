"""Prepared modules, shared by the tests that only read them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# Before nncf or openvino is imported: send no telemetry, and wait for the compilation of NNCF's extension.
os.environ["CI"] = "true"
os.environ["NNCF_CI"] = "1"
os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"

import pytest
from mpq_nncf import NNCFAdapter
from nncf_cases import Prepared, make

pytest.importorskip("nncf")
pytest.importorskip("openvino")


@pytest.fixture(scope="session")
def adapter() -> NNCFAdapter:
    return NNCFAdapter()


@pytest.fixture(scope="session")
def prepared(adapter: NNCFAdapter) -> Callable[[str], Prepared]:
    """The prepared module of a net, made once; tests must not change it."""
    made: dict[str, Prepared] = {}

    def get(net: str) -> Prepared:
        if net not in made:
            made[net] = make(net, adapter)
        return made[net]

    return get


@pytest.fixture(scope="session")
def exported(adapter: NNCFAdapter, prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The exported file of a net in a format, written once; tests must copy it before they change it."""
    made: dict[tuple[str, str], Any] = {}

    def get(net: str, format: str) -> Any:
        if (net, format) not in made:
            case = prepared(net)
            path = tmp_path_factory.mktemp("exported") / f"{net}-{format}"
            made[net, format] = adapter.export(case.module, path, case.example, format=format)
        return made[net, format]

    return get
