"""What every test runs under."""

import os

import pytest

# NNCF builds a C++ extension on first use, which can take longer than its default patience; and no telemetry from tests.
os.environ.setdefault("CI", "true")
os.environ.setdefault("NNCF_CI", "1")
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
# Networks here are tiny: a second thread costs more than it gives, on a busy machine many times more.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    """Keep what commands leave in the user's cache out of it."""
    # Not by XDG_CACHE_HOME: torch looks there too, for the extension that NNCF would then compile anew.
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setattr("mpq_plugins.common.files.cache_folder", lambda: folder)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
