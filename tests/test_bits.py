"""The bit configuration file."""

import json

import pytest
import torch
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.common.files import write_whole
from mpq_plugins.errors import FingerprintError, FormatError, PrecisionError, UnknownLayerError


@pytest.fixture
def inventory():
    return find_layers(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.ones(1, 4))


@pytest.fixture
def bits(inventory):
    layers = {"0": Precision(4, 8), "1": Precision(8, 8)}
    return BitConfig(layers, inventory.fingerprint, {"proxy": {"name": "test"}}, {"size": 9.0})


def test_a_saved_configuration_reads_back_with_the_same_bytes(bits, tmp_path):
    """Save, load, save: equal values, equal bytes, whatever the order of the layers."""
    first = bits.save(tmp_path / "a.json")
    loaded = BitConfig.load(first)
    assert (loaded, loaded.origin, loaded.costs, loaded.fingerprint) == (bits, bits.origin, bits.costs, bits.fingerprint)
    turned = BitConfig(dict(reversed(bits.layers.items())), bits.fingerprint, bits.origin, bits.costs)
    assert turned.save(tmp_path / "b.json").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda d: d.update(extra=1), FormatError, "unknown keys \\['extra'\\]"),
        (lambda d: d.pop("fingerprint"), FormatError, "lacks the keys \\['fingerprint'\\]"),
        (lambda d: d.update(format="mpq-bits/2"), FormatError, "expected 'mpq-bits/1'"),
        (lambda d: d["layers"]["0"].update(weight=9), PrecisionError, "layer '0'.*1 to 8, not 9"),
        (lambda d: d["layers"]["0"].update(weight="4"), PrecisionError, "not '4'"),
        (lambda d: d["layers"]["0"].update(weights=4), FormatError, "unknown keys \\['weights'\\]"),
        (lambda d: d["layers"]["0"].pop("activation"), FormatError, "lacks the keys \\['activation'\\]"),
        (lambda d: d.update(layers={}), FormatError, "at least one layer"),
        (lambda d: d.update(fingerprint=7), FormatError, '"fingerprint" must be text, not 7'),
        (lambda d: d.update(origin=["ompq"]), FormatError, '"origin" must be an object'),
        (lambda d: d.update(costs=3), FormatError, '"costs" must be an object, not 3'),
    ],
)
def test_every_damage_is_named(bits, tmp_path, change, error, text):
    """Unknown and missing keys, other formats and impossible bits are refused by name and place."""
    path = bits.save(tmp_path / "bits.json")
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(error, match=text):
        BitConfig.load(path)


@pytest.mark.parametrize("older", [[4, 8], "w4a8", {"weight": 4, "activation": 8}])
def test_every_form_that_files_ever_had_is_read(bits, older):
    """Pairs in checkpoints and texts in training folders of release 0.1 mean what the one form of today means."""
    document = {"fingerprint": bits.fingerprint, "layers": {"0": older, "1": {"weight": 8, "activation": 8}}}
    assert BitConfig.from_json(document, where="a file") == bits
    assert bits.to_json()["layers"]["0"] == {"weight": 4, "activation": 8}


@pytest.mark.parametrize("wrong", [[4], [4, 8, 8], ["4", "8"], [4, 9], "4", "w9", None, 4, {"weight": 4}])
def test_what_is_no_form_of_a_precision_is_refused(bits, wrong):
    """By the name of the layer and of the file."""
    with pytest.raises((FormatError, PrecisionError), match="a file: layer '0'"):
        BitConfig.from_json({"fingerprint": bits.fingerprint, "layers": {"0": wrong}}, where="a file")


def test_a_truncated_file_and_a_missing_one_are_errors(bits, tmp_path):
    """Half a file says that it is cut off; no file says so."""
    path = bits.save(tmp_path / "bits.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(FormatError, match="not complete JSON"):
        BitConfig.load(path)
    with pytest.raises(FormatError, match="No such file"):
        BitConfig.load(tmp_path / "absent.json")


def test_another_models_configuration_is_refused(bits, inventory):
    """A layer the model lacks is named with its neighbours; equal names with other shapes are told by the fingerprint."""
    bits.check(inventory)
    with pytest.raises(UnknownLayerError, match="'7'"):
        BitConfig({"7": Precision(4, 8)}, inventory.fingerprint).check(inventory)
    wider = find_layers(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), torch.ones(1, 4))
    with pytest.raises(FingerprintError, match="some weight shapes or layers differ"):
        bits.check(wider)


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path):
    """Whatever happens while writing, the folder holds the old file and nothing else."""
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]
