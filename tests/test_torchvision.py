"""The whole path on a torchvision network at 224x224, as benchmarks/torchvision_roundtrip.py runs it on three."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "torchvision_roundtrip.py"


@pytest.mark.parametrize("words", [["--routes", "nncf", "brevitas"], ["--routes", "nncf", "finn", "--activations"]])
def test_resnet18_survives_the_round_trip(words):
    """Bits, all 11.7 million weight codes, outputs and budgets of the exported files are those of the module."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--models", "resnet18", *words],
        env={**os.environ, "CI": "true", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| 21/21 | 11,678,912/11,678,912 |") == 2
