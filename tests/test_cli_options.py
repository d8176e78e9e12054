"""Options of the command line: files of options, dry runs, what is printed as it is, what is not written over."""

import json
import logging
import os
import sys

import killed
import pytest
import torch
from command import run

from mpq_plugins import BitConfig
from mpq_plugins.common.console import console

MODEL = "mpq_plugins.digits:DigitsNet"
TINY = ["--model", f"{killed.__file__}:net", "--data", f"{killed.__file__}:batches"]
COMMON = ["--model", MODEL, "--input", "1x1x8x8", "--proxy", "constant", "--budget", "size=w4"]


OPTIONS = {"model": MODEL, "input": "1x1x8x8", "proxy": "constant", "budget": ["size=w4"], "bits": [2, 4, 8]}


@pytest.mark.parametrize("kind", ["json", "bom", "toml", "underscores"])
def test_options_from_json_and_toml(folder, capsys, kind):
    """Dashes or underscores, a byte order mark, TOML: all are the same options."""
    options = {**OPTIONS, "pin_first_last" if kind == "underscores" else "pin-first-last": True, "quiet": True}
    if kind == "toml":
        lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
        (folder / "run.toml").write_text("\n".join(lines))
    else:
        (folder / "run.json").write_text(("\ufeff" if kind == "bom" else "") + json.dumps(options), encoding="utf-8")
    code, _, err = run(capsys, "allocate", "--config", "run.toml" if kind == "toml" else "run.json")
    if kind == "toml" and sys.version_info < (3, 11):
        assert code == 2
        assert "TOML needs Python 3.11" in err
        return
    assert code == 0
    bits = BitConfig.load("bits.json")
    assert str(bits["stem"]) == "w8a8"
    assert bits.origin["budgets"][0]["asked"] == "w4"


def test_positional_arguments_from_the_file(folder, capsys):
    """A file may name everything of a verb; the command line overrides its argument too."""
    run(capsys, "allocate", *COMMON, "--scores", "scores.json")
    (folder / "solve.json").write_text(json.dumps({"saved": "scores.json", "budget": "size=w3", "out": "w3.json"}))
    assert run(capsys, "solve", "--config", "solve.json")[0] == 0
    (folder / "solve.json").write_text(json.dumps({"saved": "absent.json", "budget": "size=w3", "out": "w3.json"}))
    assert run(capsys, "solve", "--config", "solve.json")[0] == 2
    assert run(capsys, "solve", "--config", "solve.json", "--out", "mine.json", "scores.json")[0] == 0
    assert BitConfig.load("w3.json") == BitConfig.load("mine.json")


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ('{"modle": "x"}', [], ["modle", "does not take", "model"]),
        ('{"out": "a", "out": "b"}', [], ["'out' stands twice"]),
        ('{"no-cache": true, "no_cache": false}', [], ["names an option twice"]),
        ('{"weights": {"a": 1}}', [], ["weights in the configuration"]),
        ("[1]", [], ["one object"]),
        ("{", [], ["not complete JSON"]),
        ("[" * 10_000, [], ["too deeply"]),
        ("{}", ["--config", "run.json"], ["given 2 times"]),
        ("{}", ["--conf", "run.json"], ["--conf"]),
        ('{"config": "other.json"}', [], ["config"]),
    ],
)
def test_a_configuration_file_that_makes_no_sense_is_told(folder, capsys, text, words, told):
    """Unknown and repeated options, nested values, a second file, an abbreviation: nothing is silently ignored."""
    (folder / "run.json").write_text(text)
    try:
        code, _, err = run(capsys, "allocate", *COMMON, "--config", "run.json", *words)
    except SystemExit as stopped:
        code, err = stopped.code, capsys.readouterr().err
    assert code == 2
    assert all(word in err for word in told), err
    assert [path.name for path in folder.iterdir()] == ["run.json"]


def test_brackets_and_colons_are_printed_as_they_are(folder, capsys):
    """Names of files, layers and formulas are no markup."""
    code, out, _ = run(capsys, "allocate", *COMMON, "--out", "a[/b]c:smile:.json")
    assert code == 0
    assert "wrote a[/b]c:smile:.json" in out
    terminal = console()
    with terminal.capture() as printed:
        terminal.print("E[g.d] [bold]x[/] :warning:")
    assert printed.get() == "E[g.d] [bold]x[/] :warning:\n"


def test_a_dry_run_checks_and_writes_nothing(folder, capsys, monkeypatch):
    """Layers, budgets and plug-ins are told; wrong ones fail as they would; no score is measured."""
    from mpq_plugins.proxies import Constant

    words = ["allocate", *COMMON, "--dry-run"]
    with monkeypatch.context() as patch:
        patch.setattr(Constant, "score", lambda *_: pytest.fail("scored"))
        code, out, _ = run(capsys, *words)
        assert code == 0
        assert "14 layers" in out
        assert "(w4)" in out
        assert run(capsys, *words, "--solver", "mlip")[0] == 2
        assert run(capsys, *words, "--budget", "bops=1")[0] == 3
    assert not list(folder.iterdir())
    run(capsys, "allocate", *COMMON)
    module = [
        "apply",
        "bits.json",
        "--model",
        MODEL,
        "--data",
        "digits",
        "--images",
        "16",
        "--adapter",
        "brevitas",
        "--dry-run",
    ]
    code, out, _ = run(capsys, *module)
    assert code == 0
    assert "14 of 14 layers" in out
    assert [path.name for path in folder.iterdir()] == ["bits.json"]


def test_a_dry_run_of_training_and_export(folder, capsys):
    """What would be trained or written is told, wrong formats and options fail as they would, and nothing is written."""
    run(capsys, "allocate", *TINY, "--budget", "size=w4")
    code, out, _ = run(capsys, "train", "bits.json", *TINY, "--adapter", "brevitas", "--epochs", 3, "--dry-run")
    assert code == 0
    assert "2 of 2 layers, 3 epochs of qat" in out
    assert [path.name for path in folder.iterdir()] == ["bits.json"]
    run(capsys, "apply", "bits.json", *TINY, "--adapter", "brevitas")
    module = ["export", "module.pt", *TINY, "--adapter", "brevitas", "--out", "m.onnx"]
    code, out, _ = run(capsys, *module, "--dry-run")
    assert code == 0
    assert "2 layers of module.pt, format qonnx" in out
    assert run(capsys, *module, "--dry-run", "--format", "onnx")[0] == 2
    assert sorted(path.name for path in folder.iterdir()) == ["bits.json", "module.pt"]


def test_a_default_given_as_an_option_is_meant(folder, capsys):
    """Against a module of other options it is refused as any other value; what the module has is taken, and so is nothing."""
    run(capsys, "allocate", *TINY, "--budget", "size=w4")
    for adapter, made, other in (
        ("brevitas", "profile=finn", "profile=layerwise"),
        ("nncf", "merge_branches=false", "merge_branches=true"),
        ("nncf", "asymmetric=true", "asymmetric=false"),
    ):
        assert run(capsys, "apply", "bits.json", *TINY, "--adapter", adapter, "--adapter-option", made)[0] == 0
        words = ["export", "module.pt", *TINY, "--adapter", adapter, "--out", "file", "--dry-run"]
        code, _, err = run(capsys, *words, "--adapter-option", other)
        assert code == 2
        assert f"was asked for, but module.pt was prepared with {made.partition('=')[0]}=" in err
        assert run(capsys, *words, "--adapter-option", made)[0] == 0
        assert run(capsys, *words)[0] == 0


def test_places_that_cannot_be_written_are_told_before_the_long_work(folder, capsys, monkeypatch):
    """Folders, pipes, loops of links, endless names, places below a file or read-only: no score is measured for them."""
    from mpq_plugins.proxies import Constant

    (folder / "folder").mkdir()
    (folder / "file").write_text("")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to("loop/x")
    (folder / "link").symlink_to("folder")
    monkeypatch.setattr(Constant, "score", lambda *_: pytest.fail("scored"))
    for out, told in {
        "folder": "it is a folder",
        "link": "it is a folder",
        "pipe": "it is a device or a pipe",
        "/dev/null": "it is a device or a pipe",
        "x" * 300: "File name too long",
        "file/x.json": "is no folder",
        "loop/x.json": "is no folder",
        "a\0b": "a character that no name can have",
    }.items():
        for option in ("out", "scores", "plot"):
            code, _, err = run(capsys, "allocate", *COMMON, f"--{option}", out)
            assert code == 2
            assert f"cannot write {out}: " in err
            assert told in err
    train = ["train", "bits.json", "--model", MODEL, "--data", "digits", "--adapter", "brevitas", "--out"]
    assert "is no folder" in run(capsys, *train, "file")[2]
    monkeypatch.setattr("mpq_plugins.common.files.os.access", lambda *_: False)
    for words in (["allocate", *COMMON], [*train, "folder"]):
        assert "a read-only file system" in run(capsys, *words)[2]


def test_a_link_is_replaced_and_its_target_stays(folder, capsys):
    """What a link leads to may belong to somebody else."""
    (folder / "target").write_text("precious")
    (folder / "bits.json").symlink_to("target")
    assert run(capsys, "allocate", *COMMON)[0] == 0
    assert (folder / "target").read_text() == "precious"
    assert len(BitConfig.load("bits.json").layers) == 14


def test_a_device_that_is_not_there_is_told(folder, capsys):
    """A misspelt one, one too many."""
    assert run(capsys, "allocate", *COMMON, "--device", "cpu")[0] == 0
    for name in ("gpu", "cuda:99", ""):
        code, _, err = run(capsys, "allocate", *COMMON, "--device", name)
        assert code == 2
        assert f"the device {name!r} cannot be used" in err


def test_log_lines_are_shown_when_asked_for(folder, capsys):
    """--verbose shows what is logged; without it warnings alone, one line each; handlers go afterwards."""
    from mpq_plugins.cli.parser import _logging

    for verbose in (False, True):
        with _logging(verbose):
            logging.getLogger("mpq_plugins.test").info("a detail")
            logging.getLogger("mpq_plugins.test").warning("a warning")
        err = capsys.readouterr().err
        assert ("a detail" in err) is verbose
        assert "a warning" in err
    assert not logging.getLogger("mpq_plugins").handlers


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "same.json", "--scores", "same.json"],
        ["--weights", "weights.pt", "--out", "weights.pt"],
        ["--weights", "weights.pt", "--plot", "./weights.pt"],
    ],
)
def test_inputs_are_not_written_over(folder, capsys, words):
    """One file for two things is refused before anything is loaded."""
    torch.save({}, "weights.pt")
    before = (folder / "weights.pt").read_bytes()
    code, _, err = run(capsys, "allocate", *COMMON, *words)
    assert code == 2
    assert "Give it another name" in err
    assert (folder / "weights.pt").read_bytes() == before


def test_replacing_a_file_is_told(folder, capsys):
    """The second run says that the first one's file goes."""
    assert "replaced" not in run(capsys, "allocate", *COMMON)[2]
    assert "bits.json is there already and is replaced" in run(capsys, "allocate", *COMMON)[2]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nncf", ["formats: openvino-compact, openvino-fast, onnx", "merge_branches = True", "true or false"]),
        ("brevitas", ["formats: qonnx, qcdq", "profile = 'layerwise'", "one of layerwise, finn"]),
        ("clado", ["tier = 'gram'", "one of fisher, gram, exact", "E[(p - y) . r]"]),
        ("stored_size", ["target = ", "unit: B"]),
        ("milp", ["backend = "]),
    ],
)
def test_plugins_tell_their_options_and_formats(capsys, name, told):
    """The text, every option with its default and what it takes."""
    code, out, _ = run(capsys, "plugins", name)
    assert code == 0
    assert all(text in out for text in told), out
    assert json.loads(run(capsys, "plugins", name, "--json")[1])


def test_an_unknown_plugin_is_told(capsys):
    """With the closest name."""
    code, _, err = run(capsys, "plugins", "cladoo")
    assert code == 2
    assert "Did you mean clado?" in err


@pytest.mark.parametrize(("verb", "is_told"), [("layers", True), ("apply", True), ("export", False)])
def test_random_weights_are_told_where_they_count(capsys, monkeypatch, verb, is_told):
    """An exported module brings its own weights; other verbs use those of the model."""
    from argparse import Namespace

    from mpq_plugins.cli import options, sources

    monkeypatch.setattr(sources, "load_model", lambda *_: torch.nn.Linear(2, 2))
    given = {"model": "torchvision:resnet18", "weights": None, "input": "1x2", "negative_padding": False, "device": "cpu"}
    options.model_of(Namespace(verb=verb, **given))
    assert ("the weights are random" in capsys.readouterr().err) is is_told


@pytest.mark.parametrize(
    "words",
    [
        ["--bits", "2", "4", "8", "--tie", "conv1,conv2", "--exclude", "fc"],
        ["--bits", "2,4,8", "--tie", "conv1", "conv2", "--exclude=fc"],
        ["--bits", "2,4", "8", "--tie", "conv1", "conv2", "--exclude", "fc"],
    ],
)
def test_lists_with_spaces_and_with_commas_are_the_same(folder, capsys, words):
    """Both spellings give the bits, the tie and the layer left in float."""
    (folder / "nets.py").write_text(
        "from collections import OrderedDict\nfrom torch import nn\n\ndef net():\n"
        "    return nn.Sequential(OrderedDict((n, nn.Linear(4, 4)) for n in ('conv1', 'conv2', 'conv3', 'fc')))\n"
    )
    common = ["--model", "nets.py:net", "--input", "1x4", "--proxy", "weight-error", "--budget", "size=w4,bops=70%"]
    code, _, err = run(capsys, "allocate", *common, "--pin", "conv3=w8", *words)
    bits = BitConfig.load("bits.json")
    assert (code, [row["name"] for row in bits.origin["budgets"]]) == (0, ["size", "bops"]), err
    assert list(bits.layers) == ["conv1", "conv2", "conv3"]
    assert (bits.origin["ties"], bits.origin["pins"]) == ([["conv1", "conv2"]], {"conv3": "w8a8"})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--budget", "size=w4", "bops=60%"], ["`mpq allocate` does not take bops=60%", "--budget size=w4 --budget bops=60%"]),
        (["--bit", "2,4"], ["does not take --bit 2,4", "mpq allocate --help"]),
        (["--bits", "2", "x"], ["'2,x' is no list of bits"]),
    ],
)
def test_words_that_belong_to_no_option_are_told_in_our_words(folder, capsys, words, told):
    """The word, and how an option with several values is written."""
    code, _, err = run(capsys, "allocate", *COMMON[:4], *words)
    assert code == 2
    assert all(text in err for text in told), err
