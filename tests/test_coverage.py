"""The benchmark of which models go through: its path on three small nets, and what its recorded results must be."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import mpq_plugins as mpq

ROOT = Path(__file__).parent.parent


@pytest.fixture
def bench(monkeypatch):
    """benchmarks/coverage.py as it is imported by itself."""
    names = ("cells", "coverage", "coverage_models")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("coverage")
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore::mpq_plugins.FloatLayersWarning")
@pytest.mark.parametrize("adapter", ["nncf", "brevitas"])
def test_small_models_end_as_they_should(bench, adapter, tmp_path):
    """One is verified, one only in part, one refused; every weight is accounted for."""
    found = {}
    for subject in bench.SUBJECTS:
        if subject.name in ("keywords, dict output", "functional weights", "half precision"):
            found[subject.name] = bench.attempt(subject, adapter, tmp_path)
    assert {name: row["outcome"] for name, row in found.items()} == {
        "keywords, dict output": "verified",
        "functional weights": "verified",
        "half precision": "refused",
    }
    whole, part = found["keywords, dict output"], found["functional weights"]
    assert (whole["share"], whole["unaccounted"], part["unaccounted"]) == (1, 0, 0)
    assert whole["batch_sizes"] == [3, 1]
    # 8 x 27 weights of a kernel, 8 x 8 of two matrices, 4 x 8 of the head; Brevitas has modules only.
    n_all, n_mixed = 216 + 2 * 64 + 32, 64
    assert part["share"] == pytest.approx((n_all - n_mixed if adapter == "nncf" else 32) / n_all, abs=1e-5)


def test_crashes_errors_and_endless_models_are_rows(bench):
    """A process that dies, a raw error and one that takes too long do not end the benchmark."""

    def row(build, limit_s=60.0):
        return bench.in_a_process(bench.Subject("model", "group", build, lambda n, seed: None), "nncf", limit_s)

    def fail():
        raise KeyError("weight")

    assert row(os.abort)["outcome"] == "crash"
    failed = row(fail)
    assert (failed["outcome"], failed["stage"], failed["text"]) == ("raw error", "build", "KeyError: 'weight'")
    assert row(lambda: time.sleep(60) or nn.Identity(), 0.5)["outcome"] == "time limit"


def test_a_weight_that_nothing_accounts_for_is_counted(bench):
    """Of 12 + 8 weights, an inventory that lost the second layer holds 12."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    found = mpq.find_layers(model, torch.zeros(1, 3))
    whole = bench._account(model, found, found.layers, found.skipped)
    lost = bench._account(model, found, found.layers[:1], ())
    assert (whole["unaccounted"], lost["unaccounted"], lost["layers"], lost["found"]) == (0, 8, 1, 2)


def test_recorded_results_leave_no_hole(bench):
    """At least 60 models with both adapters; each verified at two batch sizes or ended in our words; the page shows them."""
    cells = json.loads((ROOT / "benchmarks" / "results" / "coverage.json").read_text())["cells"]
    models = {key.rpartition("/")[0] for key in cells}
    assert len(models) >= 60
    assert {f"{model}/{adapter}" for model in models for adapter in bench.ADAPTERS} == set(cells)
    for key, row in cells.items():
        assert row["outcome"] in ("verified", "one batch size", "refused"), key
        assert row["text"] or row["outcome"] == "verified", key
        assert row.get("unaccounted", 0) == 0, key
        assert row["outcome"] != "verified" or row["batch_sizes"] == [3, 1], key
    assert (ROOT / "docs" / "coverage.md").read_text() == bench.document(cells)
