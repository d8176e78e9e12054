"""The command line on the digits network: verbs, files, and what wrong uses are told."""

import json

import pytest
import torch
from command import run

from mpq_plugins import BitConfig
from mpq_plugins.cli.parser import main
from mpq_plugins.digits import DigitsNet

MODEL = "mpq_plugins.digits:DigitsNet"
OMPQ = ["--proxy", "ompq"]
LABELLED = ["--proxy", "csmpq", "--proxy-option", "documents=classes"]
COMMON = ["--model", MODEL, "--data", "digits", "--images", "128", "--quiet"]


def test_layers_lists_layers(folder, capsys):
    """Fourteen layers with their facts, as a table and as JSON."""
    code, out, _ = run(capsys, "layers", "--model", MODEL, "--input", "1x1x8x8", "--json")
    document = json.loads(out)
    assert code == 0
    assert [layer["name"] for layer in document["layers"]][:2] == ["stem", "layer1.0.conv1"]
    assert len(document["layers"]) == 14
    assert "stem" in run(capsys, "layers", "--model", MODEL, "--input", "1x1x8x8")[1]


def test_allocate_then_solve_again_without_the_model(folder, capsys):
    """Two budgets at once are met; saved scores are solved at another budget without model or data, and plotted."""
    code, out, _ = run(
        capsys, "allocate", *COMMON, "--budget", "size=w4", "--budget", "bops=w5", "--bits", "2,3,4,5,6,8", "--pin-first-last",
        "--scores", "scores.json", "--plot", "bits.png",
    )  # fmt: skip
    assert code == 0
    assert "proven optimal" in out
    assert out.count("over all searched layers") == 3  # the table, the budget, the certificate
    bits = BitConfig.load("bits.json")
    assert {row["name"]: row["limit"] >= bits.costs[row["name"]] for row in bits.origin["budgets"]} == {
        "size": True,
        "bops": True,
    }
    assert (str(bits["stem"]), str(bits["fc"])) == ("w8a8", "w8a8")
    assert bits.origin["budgets"][0]["average_bits"]["free"] == pytest.approx(4)
    assert bits.origin["budgets"][0]["average_bits"]["all"] > 4 >= bits.origin["average_bits"]["free"]
    assert (folder / "bits.png").read_bytes()[:4] == b"\x89PNG"
    code, out, _ = run(capsys, "solve", "scores.json", "--budget", "size=w3", "--out", "w3.json", "--json", "--quiet")
    assert code == 0
    assert BitConfig.load("w3.json").costs["size"] < bits.costs["size"]
    assert json.loads(out)["status"] == "optimal"


def test_same_inputs_give_the_same_bytes(folder, capsys):
    """Two runs write identical files."""
    for name in ("a.json", "b.json"):
        run(capsys, "allocate", *COMMON, "--proxy", "csmpq", "--budget", "size=w3", "--out", name)
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()


def test_options_come_from_a_file_and_the_command_line_overrides_them(folder, capsys):
    """One JSON file serves the options of a verb."""
    (folder / "run.json").write_text(
        json.dumps({"model": MODEL, "data": "digits", "budget": ["size=w4"], "out": "from-file.json"})
    )
    assert run(capsys, "allocate", "--config", "run.json", "--proxy", "constant", "--out", "mine.json", "--quiet")[0] == 0
    assert BitConfig.load("mine.json").origin["proxy"]["name"] == "constant"
    assert not (folder / "from-file.json").exists()


def test_lists_and_switches_of_a_configuration_file(folder, capsys):
    """Bits may be a JSON list, false turns pinning off, and a budget on the command line replaces the file's."""
    document = {"model": MODEL, "data": "digits", "budget": "size=w3", "bits": [2, 4, 8], "pin-first-last": False}
    (folder / "run.json").write_text(json.dumps({**document, "proxy": "constant", "quiet": True}))
    assert run(capsys, "allocate", "--config=run.json", "--budget", "size=w4")[0] == 0
    bits = BitConfig.load("bits.json")
    assert {precision.weight for precision in bits.layers.values()} <= {2, 4, 8}
    assert (bits.origin["pins"], [row["asked"] for row in bits.origin["budgets"]]) == ({}, ["w4"])


@pytest.mark.parametrize("path", ["taken.txt/bits.json", "folder", "/proc/bits.json"])
def test_a_file_that_cannot_be_written_is_told(folder, capsys, path):
    """A file in the way, a folder of that name, a place that takes no files: each is a sentence, and nothing is left."""
    (folder / "taken.txt").write_text("mine")
    (folder / "folder").mkdir()
    code, out, err = run(capsys, "allocate", *COMMON, "--proxy", "constant", "--budget", "size=w4", "--out", path)
    assert (code, out) == (2, "")
    assert f"cannot write {path}" in err
    assert sorted(file.name for file in folder.iterdir()) == ["folder", "taken.txt"]


def test_an_unknown_picture_format_is_told(folder, capsys):
    """The ending of a plot must be one that can be drawn."""
    words = ["--proxy", "constant", "--budget", "size=w4", "--plot", "bits.xyz"]
    code, _, err = run(capsys, "allocate", *COMMON, *words)
    assert code == 2
    assert "bits.xyz names no picture format" in err


@pytest.mark.parametrize("option", ["--images", "--batch-size"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_counts_are_at_least_one(folder, capsys, option, value):
    """Zero, negative and worded counts are usage errors."""
    with pytest.raises(SystemExit) as stopped:
        run(capsys, "allocate", *COMMON, "--budget", "size=w4", option, value)
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err


def test_weights_are_loaded_strictly(folder, capsys):
    """A state dict, also inside a checkpoint with prefixes, reaches the model; another network's does not."""
    from mpq_plugins.cli.sources import load_model

    net = DigitsNet()
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, "net.pt")
    assert torch.equal(load_model(MODEL, "net.pt").fc.weight, net.fc.weight)
    torch.save(DigitsNet(width=8).state_dict(), "narrow.pt")
    code, _, err = run(capsys, "layers", "--model", MODEL, "--weights", "narrow.pt", "--input", "1x1x8x8")
    assert code == 2
    assert "of another shape" in err


def test_user_models_and_loaders_from_a_file(folder, capsys):
    """file.py:name works for the model and for the data."""
    (folder / "mine.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def build(width=4):\n    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))\n"
        "batches = [(torch.randn(16, 3), torch.zeros(16, dtype=torch.long))] * 2\n"
    )
    words = ["allocate", "--model", "mine.py:build?width=6", "--data", "mine.py:batches", "--budget", "size=w4", "--quiet"]
    assert run(capsys, *words)[0] == 0
    assert set(BitConfig.load("bits.json").layers) == {"0", "2"}


def test_plugins_lists_all_kinds(capsys):
    """Every kind of plugin is listed with a sentence."""
    code, out, _ = run(capsys, "plugins", "--json")
    document = json.loads(out)
    assert code == 0
    assert {"ompq", "csmpq", "uniform"} <= set(document["proxies"])
    assert {"nncf", "brevitas"} <= set(document["adapters"])


@pytest.mark.parametrize(
    ("words", "code", "texts"),
    [
        (["--pin", "steam=w8a8", "--budget", "size=w4"], 2, ["'steam'", "stem", "mpq layers"]),
        (["--bits", "2,9", "--budget", "size=w4"], 2, ["weight bits", "1 to 8", "9"]),
        (["--bits", "2,x", "--budget", "size=w4"], 2, ["'2,x'", "2,3,4,8"]),
        (["--budget", "size=1kB"], 3, ["size <= 1000 B cannot be met", "the least is", "Raise the limit"]),
        (["--budget", "size=1kB", "--budget", "bops=1G"], 3, ["size <= 1000 B cannot be met"]),
        (["--budget", "size=lots"], 2, ["'lots'", "6.7MiB"]),
        (["--budget", "latency=3"], 2, ["'latency'", "There are:", "bops"]),
        ([], 2, ["no budget", "size=w4"]),
        (["--proxy", "omqp", "--budget", "size=w4"], 2, ["'omqp'", "Did you mean ompq?"]),
        ([*OMPQ, "--proxy-option", "gamma=3", "--budget", "size=w4"], 2, ["gamma", "options are", "beta"]),
        ([*OMPQ, "--proxy-option", "beta=much", "--budget", "size=w4"], 2, ["beta must be a number, not 'much'", "default"]),
        ([*OMPQ, "--proxy-option", "utility=linaer", "--budget", "size=w4"], 2, ["utility must be", "not 'linaer'"]),
        (["--proxy-option", "n_images=-5", "--budget", "size=w4"], 2, ["n_images is -5"]),
        (["--solver-option", "gap=tiny", "--budget", "size=w4"], 2, ["gap must be a number, not 'tiny'"]),
        (["--weights", "absent.pt", "--budget", "size=w4"], 2, ["absent.pt", "Check the path"]),
        (["--weights", "broken.pt", "--budget", "size=w4"], 2, ["broken.pt", "cannot be loaded safely", "state_dict"]),
        (["--weights", "pickle.pt", "--budget", "size=w4"], 2, ["pickle.pt", "cannot be loaded safely"]),
        ([*LABELLED, "--data", "bare.py:batches", "--budget", "size=w4"], 2, ["labels"]),
        (["--data", "bare.py:broken", "--budget", "size=w4"], 2, ["not finite", "NaN in the images"]),
        ([*OMPQ, "--data", "bare.py:broken", "--budget", "size=w4"], 2, ["not finite", "stem"]),
    ],
)  # fmt: skip
def test_wrong_uses_are_told_the_fact_the_values_and_the_next_step(folder, capsys, words, code, texts):
    """Each hurried mistake gets its exit code and its sentence, and leaves no file behind."""
    (folder / "broken.pt").write_bytes(b"PK\x03\x04 cut off")
    torch.save(DigitsNet(), "pickle.pt")
    (folder / "bare.py").write_text(
        "import torch\nbatches = [torch.randn(8, 1, 8, 8)] * 2\nbroken = [torch.full((8, 1, 8, 8), float('nan'))]\n"
    )
    before = sorted(folder.iterdir())
    found, out, err = run(capsys, "allocate", *COMMON, *words)
    assert (found, out) == (code, "")
    assert all(text in err for text in texts), err
    assert sorted(path for path in folder.iterdir() if path.name != "__pycache__") == before


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (["--model", "theirs.py:buggy"], ["theirs.py:buggy", "NameError", "line 5"]),
        (["--model", "broken.py:build"], ["cannot import broken.py", "ZeroDivisionError", "line 1"]),
        (["--data", "theirs.py:lost"], ["theirs.py:lost", "KeyError", "line 9"]),
        (["--data", "theirs.py:nothing"], ["gives a NoneType, not batches"]),
        (["--data", "imagefolder:images", "--input", "1x3x8x8"], ["junk.png cannot be read"]),
        (["--weights", "listed.pt"], ["does not fit", "fc.bias"]),
    ],
)
def test_errors_of_the_users_code_and_files_come_with_their_place(folder, capsys, words, texts):
    """A bug in a model file, a loader that fails in the middle, a damaged image: a sentence each, no traceback."""
    (folder / "theirs.py").write_text(
        "import torch\nfrom torch import nn\n\ndef buggy():\n    return undefined_name\n\n"
        "def lost():\n    yield torch.randn(4, 1, 8, 8)\n    raise KeyError('lost')\n\nnothing = None\n"
    )
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "images" / "cats").mkdir(parents=True)
    (folder / "images" / "cats" / "junk.png").write_text("junk")
    torch.save({**DigitsNet().state_dict(), "fc.bias": [1.0]}, "listed.pt")
    # The folder of images needs a model that takes its three channels.
    (folder / "colour.py").write_text("from torch import nn\ndef build():\n    return nn.Conv2d(3, 2, 3)\n")
    model = ["--model", "colour.py:build"] if "--input" in words else []
    code, out, err = run(capsys, "allocate", *COMMON, "--budget", "size=w4", *model, *words)
    assert (code, out) == (2, "")
    assert all(text in err for text in texts), err
    assert not (folder / "bits.json").exists()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(loss=5), "cannot be read"),
        (lambda d: d["loss"][1].__setitem__(0, "x"), "cannot be read"),
        (lambda d: d["loss"][1].pop(), "choices"),
        (lambda d: d["space"]["layers"].pop(), "each of its layers once"),
        (lambda d: d["space"]["units"][1].update(choices=["w99a8"]), "not 99"),
    ],
)
def test_damaged_scores_are_refused(folder, capsys, change, text):
    """Scores edited by hand are a sentence with the file's name, whatever is wrong in them."""
    run(capsys, "allocate", *COMMON, "--proxy", "constant", "--budget", "size=w4", "--scores", "scores.json")
    document = json.loads((folder / "scores.json").read_text())
    change(document)
    (folder / "scores.json").write_text(json.dumps(document))
    code, out, err = run(capsys, "solve", "scores.json", "--budget", "size=w3")
    assert (code, out) == (2, "")
    assert "scores.json" in err
    assert text in err


def test_a_loader_that_yields_loses_no_batch(folder, capsys):
    """A generator function is called anew for every pass, so looking at the first batch does not use it up."""
    (folder / "mine.py").write_text(
        "import torch\ndef batches():\n    for seed in range(2):\n"
        "        yield torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(seed))\n"
    )
    words = ["--model", MODEL, "--data", "mine.py:batches", "--budget", "size=w4", "--quiet", "--scores", "scores.json"]
    assert run(capsys, "allocate", *words)[0] == 0
    assert json.loads((folder / "scores.json").read_text())["facts"]["n_images"] == 32


def test_an_infeasible_budget_is_refused_before_scoring(folder, capsys, monkeypatch):
    """The proxy is never asked when the budget cannot be met."""
    from mpq_plugins.proxies import OMPQ

    monkeypatch.setattr(OMPQ, "score", lambda *_: pytest.fail("scored"))
    assert run(capsys, "allocate", *COMMON, "--budget", "size=1kB")[0] == 3


def test_a_missing_extra_names_the_command_that_installs_it(folder, capsys, monkeypatch):
    """Without scikit-learn the digits ask for the extra that brings it."""
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, _, err = run(capsys, "allocate", *COMMON, "--budget", "size=w4")
    assert code == 2
    assert "pip install 'mpq-plugins[demo]'" in err


def test_a_missing_command_is_a_usage_error(capsys):
    """No verb prints the usage and exits with 2."""
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


def test_apply_tells_missing_labels_before_it_writes(folder, capsys):
    """Evaluating needs labels: without them no module is left behind."""
    run(capsys, "allocate", *COMMON, "--proxy", "constant", "--budget", "size=w4")
    (folder / "bare.py").write_text("import torch\nbatches = [torch.randn(8, 1, 8, 8)] * 2\n")
    words = ["--model", MODEL, "--data", "bare.py:batches", "--adapter", "brevitas", "--evaluate", "--quiet"]
    code, _, err = run(capsys, "apply", "bits.json", *words)
    assert code == 2
    assert "labels" in err
    assert not (folder / "module.pt").exists()
