"""The bench on real networks: its path on two tiny networks made in code, and what its figures are made of."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

REAL = Path(__file__).parent.parent / "benchmarks" / "real"


@pytest.fixture
def bench(monkeypatch):
    """A module of the bench by name, as its own scripts import it."""
    monkeypatch.syspath_prepend(str(REAL.parent))
    monkeypatch.syspath_prepend(str(REAL))
    names = [path.stem for path in REAL.glob("*.py")]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


def test_the_whole_path_runs_without_a_download(tmp_path):
    """Every part is measured and printed for both stand-ins; nothing is written to the results."""
    run = [sys.executable, str(REAL / "run.py"), "--tiny"]
    environment = {**os.environ, "CI": "true", "MPQ_REAL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = [line for line in done.stdout.splitlines() if line.startswith("tiny_") and "{'" not in line]
    assert sum("weights {" in line for line in tables) == 2 * 4  # two networks, two menus, pinned and free
    assert sum("batch normalisation" in line for line in tables) == 2
    assert sum("through the adapters" in line for line in tables) == 2
    assert sum("bit operations of uniform" in line for line in tables) == 2
    assert sum("by the options of prepare" in line for line in tables) == 2
    assert sum("best measured of 16" in line for line in tables) == 2
    rows = [line for line in done.stdout.splitlines() if line.startswith("| clado gram |")]
    assert len(rows) == 8 + 2 + 2  # the two of joint bits, and of the plans that are measured
    assert not any(cell.strip() == "-" for row in rows for cell in row.split("|")[3:-1])  # every average of every table
    assert not (tmp_path / "cache").exists()


def test_training_runs_without_a_download(tmp_path):
    """All methods at all bits are trained on a stand-in and printed; nothing is written to the results."""
    run = [sys.executable, str(REAL / "training.py"), "--tiny"]
    environment = {**os.environ, "CI": "true", "MPQ_REAL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ") and line.count("; ") == 8}
    assert rows == {"| w4a4", "| w3a3", "| mixed"}  # three figures for each of four methods
    assert not (tmp_path / "cache").exists()


def test_the_cost_of_prepare_is_measured_without_a_download(tmp_path):
    """Both adapters and both frameworks' own quantization run on a stand-in, and a ratio is printed for each."""
    run = [sys.executable, str(REAL / "prepare_time.py"), "--tiny", "--images", "16"]
    environment = {**os.environ, "CI": "true", "MPQ_REAL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[-2:]] == ["| nncf", "| brevitas"]
    assert not (tmp_path / "cache").exists()


def test_crops_are_the_same_for_all_methods(bench):
    """A seed and an epoch give the same images with the float network's logits; others give other images."""
    training = bench("training")
    ground, again = (training.stand_in(32, 8, 12, "cpu") for _ in range(2))
    (images, logits), (other, _) = ground.crops(0, 2, 1)
    assert images.shape == (16, 3, 12, 12)
    assert torch.equal(images, again.crops(0, 2, 1)[0][0])
    torch.testing.assert_close(logits, ground.case.net(images))
    assert not torch.equal(images, other)
    assert not any(torch.equal(images, ground.crops(seed, 2, epoch)[0][0]) for seed, epoch in ((1, 1), (0, 2)))


@pytest.mark.parametrize(
    ("read", "word", "edits"), [("kitten", "sitting", 3), ("", "abc", 3), ("same", "same", 0), ("ab", "ba", 2)]
)
def test_edits_are_counted(bench, read, word, edits):
    """Letters inserted, deleted and replaced, counted by hand."""
    assert bench("judge").edit_distance(read, word) == edits


def test_repeats_and_blanks_are_no_letters(bench):
    """The steps a a - a b b - read "aab": a repeat is one letter unless a blank is between."""
    assert bench("judge").read_steps([1, 1, 0, 1, 2, 2, 0], "ab") == "aab"


def test_correction_moves_statistics_by_what_the_weight_did(bench):
    """A weight doubled: the input of the norm has twice the mean and four times the variance, and so have its statistics."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    with torch.no_grad():
        net[0].weight.fill_(1.0)
        net[0].bias.zero_()
        net[1].running_mean.fill_(5.0)  # of other images than those below
        net[1].running_var.fill_(3.0)
    module = torch.nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    module.load_state_dict(net.state_dict())
    with torch.no_grad():
        module[0].weight.fill_(2.0)
    batch = torch.tensor([1.0, 2.0, 3.0, 6.0]).reshape(4, 1, 1, 1)  # mean 3, variance 3.5
    bench("correction").correct_batch_norm(net, module, (batch,))
    assert float(module[1].running_mean) == pytest.approx(5.0 + (6.0 - 3.0))
    assert float(module[1].running_var) == pytest.approx(3.0 * 4.0)


def test_the_correction_is_that_of_the_core(bench):
    """The bench keeps the float network's moments between plans; on one batch statistics are those of the core's correction."""
    from mpq_plugins.quantizers.batch_norm import correct_by_difference, norm_sites

    case = bench("standins").tiny_cnn(8, 8, 0)
    assert len(case.calibration) == 1
    weights = bench("weights").Weights(case.net, case.example)
    for width in (4, 2):  # the second finds the moments of the first
        ours, theirs = (weights.at(weights.uniform(width, pinned=False)) for _ in range(2))
        bench("correction").correct_batch_norm(case.net, ours, case.calibration)
        correct_by_difference(case.net, theirs, [(inputs, None) for inputs in case.calibration], norm_sites(theirs))
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_a_smaller_menu_leaves_choices_out(bench):
    """The losses of {2,4,8} are those of the same choices among the six widths."""
    standins, scores, weights = bench("standins"), bench("scores"), bench("weights")
    case = standins.tiny_mixer(8, 8, 0)
    own = weights.Weights(case.net, case.example)
    wide, narrow = (scores.space_of(own, widths, "free") for widths in ((2, 3, 4, 5, 6, 8), (2, 4, 8)))
    from mpq_plugins.proxies import WeightError

    found = scores.restricted(WeightError().score(case.net, wide), narrow)
    for ours, theirs in zip(found.loss, WeightError().score(case.net, narrow).loss, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
