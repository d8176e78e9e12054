"""What stays in float is said: the warning, its figures, and the error of strict."""

import json
import warnings

import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from mpq_plugins import FloatLayersWarning
from mpq_plugins.cli.parser import main
from mpq_plugins.errors import SpaceError
from mpq_plugins.model.left_in_float import LeftInFloat

NET = """
import torch
from torch import nn


class Addmm(nn.Module):
    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def build():
    torch.manual_seed(0)
    return nn.Sequential(Addmm(6, 5), nn.ReLU(), nn.Linear(5, 14))  # 30 weights of 100
"""


@pytest.fixture
def net():
    space: dict[str, object] = {}
    exec(NET, space)
    return space["build"]()


def test_the_share_of_weights_left_in_float_is_warned_of(net):
    """Thirty of a hundred weights that no layer holds are told with that figure and the reason, by both entries."""
    example = torch.randn(4, 6)
    for call in (
        lambda: mpq.allocate(net, example, proxy="weight-error", budgets={"size": "w4"}),
        lambda: mpq.build_space(net, example),
    ):
        with pytest.warns(FloatLayersWarning, match=r"^30 % of the weights and 30 % of the MACs stay in float") as caught:
            call()
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert "30 % of the weights and 30 % of the MACs: 0: Addmm: read by addmm" in str(caught[0].message)


def test_strict_makes_it_an_error(net):
    """`strict` refuses the model with the same figures, before anything is scored."""
    for call in (
        lambda: mpq.allocate(net, torch.randn(4, 6), proxy="no such", budgets={"size": "w4"}, strict=True),
        lambda: mpq.build_space(net, torch.randn(4, 6), strict=True),
    ):
        with pytest.raises(SpaceError, match=r"30 % of the weights .*\n.*addmm.*\nExclude"):
            call()


def test_nothing_is_said_where_everything_is_in():
    """A model whose weights are all searched gives no warning, and one excluded by less than 1 % neither."""
    small = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 1), nn.Linear(1, 500))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpq.build_space(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(1, 4), strict=True)
        mpq.build_space(small, torch.ones(1, 4), exclude=["0"], strict=True)


def test_exclusions_are_told_and_no_error():
    """What the user excluded is warned of with its share; `strict` is about the rest."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 16))
    with pytest.warns(FloatLayersWarning, match=r"^20 % of the weights.*\n.*excluded by the user"):
        mpq.build_space(net, torch.ones(1, 4), exclude=["0"], strict=True)


def test_reasons_are_grouped_and_few():
    """The largest reason stands first with its count, and beyond four reasons only their number is told."""
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20)))
    layers = mpq.find_layers(net, torch.ones(1, 3)).layers
    reasons = {layer.name: ("large" if i < 10 else f"small {i}") for i, layer in enumerate(layers) if i < 16}
    from mpq_plugins.model.layers import skipped_layers

    left = LeftInFloat.of([layer for layer in layers if layer.name not in reasons], skipped_layers(layers, reasons))
    lines = str(left).splitlines()
    assert lines[0].startswith("80 % of the weights and 80 % of the MACs")
    assert lines[1] == "  50 % of the weights and 50 % of the MACs: 0 and 9 more: large"
    assert lines[-1] == "  and 3 smaller reasons; `mpq layers` lists all"
    assert len(lines) == 6


def test_what_a_target_refuses_counts():
    """Layers that an adapter cannot convert, and those that it refuses at every precision, are counted alike."""
    pytest.importorskip("brevitas")
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 16))
    with pytest.warns(FloatLayersWarning, match=r"^20 % of the weights.*\n.*parametrized"):
        mpq.build_space(net, torch.ones(1, 4), adapter="brevitas")
    up = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ConvTranspose2d(4, 4, 1, groups=2))
    with pytest.warns(FloatLayersWarning, match=r"^50 % of the weights.*\n.*grouped transposed"):
        mpq.build_space(up, torch.ones(1, 2, 3, 3), adapter="brevitas")


def test_shares_survive_saved_scores_and_old_files_are_read(net, tmp_path):
    """Weights and MACs of skipped entries come back from JSON; files without them read as zero."""
    with pytest.warns(FloatLayersWarning):
        space = mpq.build_space(net, torch.randn(4, 6))
    document = json.loads(json.dumps(space.to_json()))
    assert mpq.Space.from_json(document).skipped == space.skipped
    old = {**document, "skipped": [{"name": item.name, "reason": item.reason} for item in space.skipped]}
    assert [item.n_weights for item in mpq.Space.from_json(old).skipped] == [0]


def test_the_command_line_says_it_once_on_stderr(tmp_path, monkeypatch, capsys):
    """`allocate` prints one warning and no Python traceback line, `--strict` ends with exit code 2, `layers` shows shares."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    common = ["--model", "net.py:build", "--input", "4x6", "--quiet"]
    allocate = ["allocate", *common, "--proxy", "weight-error", "--budget", "size=w4", "--out", "bits.json"]
    assert main(allocate) == 0
    out, err = capsys.readouterr()
    assert err.startswith("warning: 30 % of the weights and 30 % of the MACs stay in float")
    assert err.count("stay in float and outside") == 1
    assert "FloatLayersWarning" not in err
    assert "1 not quantized: 30 % of the weights and 30 % of the MACs" in out
    (tmp_path / "bits.json").unlink()
    assert main([*allocate, "--strict"]) == 2
    assert "30 % of the weights" in capsys.readouterr().err
    assert not (tmp_path / "bits.json").exists()
    assert main(["layers", *common, "--json", "--strict"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["left_in_float"]["weights"] == pytest.approx(0.3)
    assert set(document["skipped"]) == {"0"}
