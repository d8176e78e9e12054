"""Every example runs as it stands, in an interpreter of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, tmp_path):
    """The script ends well and leaves its files in the folder it is given."""
    done = subprocess.run(
        [sys.executable, example, tmp_path], env={**os.environ, "CI": "true"}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert list(tmp_path.glob("*.json"))


def test_there_are_examples():
    """The list above is not empty by accident."""
    assert len(EXAMPLES) >= 3
