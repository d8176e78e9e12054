"""Comparing proxies: the controls are always there, and everybody keeps the budget."""

import json

from mpq_plugins.cli.parser import main
from mpq_plugins.reports import CONTROLS

WORDS = ["compare", "--model", "mpq_plugins.digits:DigitsNet", "--data", "digits", "--images", "64", "--batch-size", "300"]


def test_a_comparison_shows_every_control_at_the_same_budget(tmp_path, capsys, monkeypatch):
    """One proxy, all four controls, two random seeds; sizes within the budget; a plot and a JSON file."""
    monkeypatch.chdir(tmp_path)
    words = [
        "--adapter",
        "nncf",
        "--proxies",
        "csmpq",
        "--seeds",
        "2",
        "--budget",
        "size=w3",
        "--pin-first-last",
        "--out",
        "c.json",
        "--plot",
        "c.png",
    ]
    assert main([*WORDS, *words, "--json", "--quiet"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["rows"]
    assert {row["proxy"].split("#")[0] for row in rows} == {"csmpq", *CONTROLS}
    assert len(rows) == 6
    uniform = next(row for row in rows if row["proxy"] == "uniform")
    assert set(uniform["bits"].values()) == {"w8a8", "w3a8"}
    assert all(row["costs"]["size"] <= uniform["costs"]["size"] for row in rows)
    assert json.loads((tmp_path / "c.json").read_text()) == document
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_comparing_without_labelled_data_is_refused(capsys):
    """Accuracy needs data, and the error says how to give it."""
    assert main(["compare", "--model", "torchvision:resnet18", "--adapter", "nncf", "--quiet"]) == 2
    assert "--data" in capsys.readouterr().err
