"""A small run of benchmarks/fuzz.py: no reader of what users write lets another library's error through."""

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "fuzz.py"


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def test_mutated_inputs_are_taken_or_refused_in_our_words(fuzz):
    """Every reader meets a hundred mutations, refuses some and takes some."""
    found = fuzz.fuzz(100, seed=1)
    assert {name: counts.examples for name, counts in found.items() if counts.raw} == {}
    assert all(counts.taken + counts.refused == 100 for counts in found.values())
    assert all(counts.refused and counts.taken for counts in found.values())


def test_the_script_notices_an_error_of_another_kind(fuzz):
    """A reader that raises KeyError is counted and shown."""
    counts = fuzz.Counts()
    counts.try_(lambda: {}["x"], "input")
    assert (counts.raw, counts.taken, counts.refused) == (1, 0, 0)
    assert counts.examples[0].startswith("KeyError: 'x'")
