"""The demo: what it reads from installed packages, how it judges, and the small one whole."""

import json
import math
import sys

import pytest
import torch
from test_cli import run

from mpq_plugins.cli.demo import Images, Row, demo_table, what_to_see
from mpq_plugins.cli.imagenet_demo import imagenet_network, labelled_images, photographs, shifted_images
from mpq_plugins.errors import MissingExtraError


def test_the_float_network_has_18_of_20_images_right():
    """Weights, preprocessing and labels fit together, as they did when others measured them."""
    batch = labelled_images()
    assert batch.inputs.shape == (20, 3, 224, 224)
    with torch.no_grad():
        answers = imagenet_network()(batch.inputs).argmax(1)
    assert int((answers == batch.labels).sum()) == 18


def test_photographs_are_seeded_crops_of_equally_many_pictures():
    """The same seed gives the same images, another one others; batches of the size asked for hold the whole range of pixels."""
    first, second = photographs(28, batch_size=16, seed=1), photographs(28, batch_size=16, seed=1)
    assert [len(batch) for batch in first] == [16, 12]
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0].inputs, photographs(28, batch_size=16, seed=2)[0].inputs)
    assert float(first[0].inputs.min()) == -127 / 128
    assert float(first[0].inputs.max()) == 1.0


def test_shifted_images_keep_their_labels():
    """Each of the 20 images comes as often as asked for, with its own label."""
    assert shifted_images(2).labels.tolist() == [label for label in labelled_images().labels.tolist() for _ in range(2)]


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    """Without the images the demo names the extra and the small network; foolbox itself is never imported."""
    assert "foolbox" not in sys.modules
    assert "skimage" not in sys.modules
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mpq-plugins\[demo\]'.*--network digits"):
        labelled_images()


def test_distance_and_answers_are_worked_out_by_hand():
    """Two images of two classes: KL of (1/2, 1/2) from (1/4, 3/4) is log 2 - log 3 / 2, and nothing for equal outputs."""
    images = Images(torch.zeros(2, 1), torch.tensor([1]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    figures = images.judge(torch.tensor([[0.0, math.log(3)], [1.0, 0.0]]))
    kl = math.log(2) - math.log(3) / 2
    assert figures["kl"] == pytest.approx(kl / 2)
    assert figures["kl_error"] == pytest.approx(kl / 2)  # standard deviation kl / sqrt(2), two images
    assert (figures["agreement"], figures["n_right"]) == (0.5, 1)


def test_the_table_says_which_file_is_wrong():
    """A row whose file does not verify reads NO, and the last lines speak of the figures of the table."""
    good = Row("4 bits", "nncf", 4.0, 2.5, 3.0, 0.5, 0.1, 0.5, 15, ())
    bad = Row("mixed, measured", "nncf", 4.0, 2.5, 3.0, 0.25, 0.1, 0.75, 17, ("conv: asked for w4a8",))
    columns = {str(column.header): list(column.cells) for column in demo_table([good, bad], 60, 20).columns}
    assert columns["verified"] == ["yes", "NO"]
    assert columns["right of 20"] == ["15", "17"]
    assert "0.50" in what_to_see([good, bad])[0]
    assert "0.25" in what_to_see([good, bad])[0]


def test_the_digits_demo_ends_well(tmp_path, capsys):
    """The whole path through one adapter: every exported file verifies, and random bits are beside the others if asked for."""
    code, out, _ = run(
        capsys, "demo", "--network", "digits", "--adapters", "brevitas", "--seeds", "1", "--out", tmp_path, "--json", "--quiet"
    )
    rows = {row["plan"]: row for row in json.loads(out)["rows"]}
    assert code == 0
    assert list(rows) == ["float", "8 bits", "4 bits", "mixed, no data", "mixed, measured", "random 0"]
    assert not any(row["problems"] for row in rows.values())
    assert rows["8 bits"]["kl"] < rows["4 bits"]["kl"]
    assert all(rows[name]["weights_mb"] <= rows["4 bits"]["weights_mb"] for name in ("mixed, no data", "random 0"))
    assert (tmp_path / "mixed-brevitas.onnx").is_file()
