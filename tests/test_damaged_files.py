"""Files as people have them: damaged, edited, foreign, on full disks. None is believed, none ends in a traceback."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
from full_disk import full_disk
from torch import nn

from mpq_plugins import BitConfig, Precision, Scores, allocate
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.checkpoint import read_checkpoint, write_checkpoint
from mpq_plugins.cli.sources import load_weights
from mpq_plugins.common.files import parse_json, write_json, write_whole
from mpq_plugins.common.tensor_files import read_torch, write_tensors, write_torch
from mpq_plugins.errors import FormatError, ModelError, MPQError, PrecisionError, WriteError
from mpq_plugins.proxies import LossIncrease
from mpq_plugins.proxies.measuring import keeping_measurements
from mpq_plugins.proxies.measuring.cache import MeasurementCache
from mpq_plugins.training.checkpoints import TrainingFolder

BITS = BitConfig({"0": Precision(4, 8)}, "sha256:0", {"proxy": {"name": "test"}})


def flip(path, needle):
    """Change three bytes inside the stored `needle`, leaving everything else as it is."""
    data = bytearray(path.read_bytes())
    at = data.index(needle) + 4
    data[at : at + 3] = bytes(byte ^ 0x15 for byte in data[at : at + 3])
    path.write_bytes(data)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


@pytest.mark.parametrize("reader", ["checkpoint", "weights"])
def test_three_changed_bytes_in_a_weight_are_found(tmp_path, reader):
    """torch loads the file without a word; the archive's checksum tells the part."""
    model, path = net(), tmp_path / "file.pt"
    needle = model[0].weight.detach().numpy().tobytes()
    if reader == "checkpoint":
        write_checkpoint(path, attach_bits(net(), BITS), {"state": dict(model.state_dict())}, adapter="test")
        assert read_checkpoint(path, {"state"}, adapter="test")[0] == BITS
    else:
        write_torch(path, model.state_dict())
        load_weights(net(), path)
    flip(path, needle)
    assert torch.load(path, weights_only=True) is not None
    with pytest.raises(MPQError, match=r"file.pt is damaged: its part '.*data/\d+' does not match its checksum"):
        read_checkpoint(path, {"state"}, adapter="test") if reader == "checkpoint" else load_weights(net(), path)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return (open, (self._path, "w"))


@pytest.mark.parametrize("kind", ["pickle", "module", "compressed", "cut", "text", "old"])
def test_what_is_no_file_of_tensors_is_refused_and_runs_nothing(tmp_path, kind):
    """Pickles, whole modules, compressed and cut archives; files of torch before its archives are still read."""
    path, ran = tmp_path / "file.pt", tmp_path / "ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(str(ran))))
    elif kind == "module":
        torch.save({"a": Evil(str(ran))}, path)
    elif kind == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"0" * 10_000)
    elif kind == "text":
        path.write_text("hello")
    else:
        torch.save(net().state_dict(), path, _use_new_zipfile_serialization=kind != "old")
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-100])
    if kind == "old":
        assert set(read_torch(path)) == {"0.weight", "0.bias", "2.weight", "2.bias"}
        return
    with pytest.raises(FormatError, match=r"file.pt is (no file of tensors, or a damaged one|a compressed archive)"):
        read_torch(path)
    with pytest.raises(ModelError, match="cannot be loaded safely"):
        load_weights(net(), path)
    assert not ran.exists()


@pytest.mark.parametrize("damage", ["numbers", "keys", "swapped", "cut", "other run", "pickle"])
def test_a_measurement_that_is_not_as_it_was_written_is_made_again(tmp_path, damage):
    """Same names with other numbers, other keys, a file of another key or run, a pickle: none counts, and none is run."""
    with keeping_measurements(tmp_path):
        journal, other = MeasurementCache({"run": 1}), MeasurementCache({"run": 2})
        journal.put("a", {"loss": np.arange(4.0)})
        journal.put("b", {"loss": np.ones(4)})
        other.put("a", {"loss": np.ones(4)})
        path = journal._file("a")
        if damage == "numbers":
            flip(path, np.arange(4.0).tobytes())
        elif damage == "keys":
            write_tensors(path, {"losses": np.arange(4.0)})
        elif damage == "swapped":
            path.write_bytes(journal._file("b").read_bytes())
        elif damage == "other run":
            path.write_bytes(other._file("a").read_bytes())
        elif damage == "pickle":
            path.write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
        else:
            path.write_bytes(path.read_bytes()[:-8])
        assert journal.get("a") is None
        assert np.array_equal(journal.get("b")["loss"], np.ones(4))
    assert not (tmp_path / "ran").exists()


def test_edited_measurements_do_not_change_the_bits(tmp_path):
    """Every kept file with its numbers negated: the same command gives the bits that it gave before."""
    from safetensors.numpy import load_file, save_file

    batches = [(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 3)]
    wanted = {"budgets": {"size": "w4"}, "proxy": LossIncrease(), "cache": tmp_path}
    first = allocate(net(), batches[0][0][:1], batches, **wanted)
    for path in tmp_path.glob("*/*.safetensors"):
        save_file({name: np.asarray(-array) for name, array in load_file(path).items()}, path)
    again = allocate(net(), batches[0][0][:1], batches, **wanted)
    assert (again.bits, again.scores.loss) == (first.bits, first.scores.loss)


@pytest.mark.parametrize("room", [0, 700])
@pytest.mark.parametrize("kind", ["torch", "tensors", "json", "journal"])
def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path, kind, room):
    """torch, safetensors and Python each fail in their own way: all become one sentence, and no debris stays."""
    path = tmp_path / "file.bin"
    path.write_text("old")
    values = np.arange(1000.0)
    with keeping_measurements(tmp_path / "cache"):
        journal = MeasurementCache({"run": 1})
    write = {
        "torch": lambda: write_torch(path, {"a": torch.from_numpy(values)}),
        "tensors": lambda: write_tensors(path, {"a": values}),
        "json": lambda: write_json(path, {"a": values.tolist()}),
        "journal": lambda: journal.put("a", {"a": values}),
    }[kind]
    with full_disk(room), pytest.raises(WriteError, match=r"cannot (write .*|be kept under .*)(large|full).* space left"):
        write()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir() if file.name != "cache"] == ["file.bin"]
    write()


JSON = [
    ("[" * 100_000, "nests its lists"),
    ("[" * 80 + "]" * 80, "levels of lists"),
    ('{"a": 1, "a": 2}', "'a' stands twice"),
    ('{"a": Infinity}', "Infinity is no number"),
    ('{"a": NaN}', "NaN is no number"),
    ('{"a": 1e999}', "too large"),
    ('{"a": ' + "9" * 5000 + "}", "5000 digits"),
    (r'{"a": "\ud800"}', "surrogates"),
    (b"\xff\xfe{", "invalid start byte"),
    ('{"a": 1', "not complete JSON"),
]


@pytest.mark.parametrize(("text", "reason"), JSON, ids=[reason for _, reason in JSON])
def test_json_that_python_would_take_or_fail_on_is_refused(text, reason):
    """One reader for all our files: what cannot be written again is not read."""
    with pytest.raises(FormatError, match=reason):
        parse_json(text, where="file.json")


def test_a_byte_order_mark_is_skipped(tmp_path):
    """Editors on Windows begin a file with one."""
    path = BITS.save(tmp_path / "bits.json")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert BitConfig.load(path) == BITS


@pytest.mark.parametrize("text", ["w" + "9" * 400, "w4a" + "9" * 5000, "w\u0664", "w4 a8", ""])
def test_precisions_of_many_digits_are_refused(text):
    """Thousands of digits, other scripts' digits."""
    with pytest.raises(PrecisionError):
        Precision.parse(text)


@pytest.fixture
def scores(tmp_path):
    found = allocate(net(), torch.randn(1, 6), budgets={"size": "w4"}, proxy="constant").scores
    path = found.save(tmp_path / "scores.json")
    return path, json.loads(path.read_text())


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(pairwise=[[0.0, 1.0], [1.0, 0.0]]),
        lambda d: d.update(pairwise="none"),
        lambda d: d["loss"][0].__setitem__(0, True),
        lambda d: d["space"]["layers"][0].update(weight_shape=7),
        lambda d: d["space"]["layers"][0].update(n_weights="30"),
        lambda d: d["space"]["layers"][0].update(n_weights=0),
        lambda d: d["space"]["layers"][0].update(macs=-1),
        lambda d: d["space"]["layers"][0].update(aliases=[1]),
        lambda d: d["space"]["layers"][0].pop("kind"),
        lambda d: d["space"]["units"][0].update(choices=[]),
        lambda d: d["space"]["units"][0].update(choices=[4]),
        lambda d: d["space"]["units"][0].update(activation_group="0"),
        lambda d: d["space"].update(pins={"0": 4}),
        lambda d: d["space"].update(skipped=[1]),
        lambda d: d["space"].update(fingerprint=None),
        lambda d: [layer.update(shares_weight_with="x") for layer in d["space"]["layers"]],
        lambda d: d.update(proxy=3),
        lambda d: d.update(facts=[1]),
    ],
)
def test_scores_whose_parts_are_of_another_kind_are_refused(scores, change):
    """Every part is checked for what it is, and told with the file's name."""
    path, document = scores
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(FormatError, match=r"scores\.json"):
        Scores.load(path)


def test_a_full_disk_ends_training_with_the_last_checkpoint_whole(tmp_path):
    """The checkpoint of the epoch that did not fit leaves no trace; the one before it is read."""
    folder, weights = TrainingFolder(tmp_path), {"a": torch.arange(1000.0)}
    state = dict.fromkeys(("stage", "epoch", "optimizer", "average", "scaler", "profit", "history"), 1)
    first = folder.save(1, lambda path: write_torch(path, weights), state)
    for room in (0, 2000, 5000):  # not even the module, half of it, all but the state
        with full_disk(room), pytest.raises(WriteError, match="the checkpoints before it are whole"):
            folder.save(2, lambda path: write_torch(path, weights), {**state, "optimizer": torch.arange(5000.0)})
        assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert TrainingFolder.read(first)[1] == {**state, "format": "mpq-training-state/1"}


@pytest.mark.parametrize("text", ["unsupported operator", "unknown node ArgPos error"])
def test_errors_that_are_of_no_disk_pass(tmp_path, text):
    """Neither a file that was looked for before nor a word that looks like a disk's makes a `WriteError`."""

    def write(path):
        try:
            (tmp_path / "not there").read_bytes()
        except FileNotFoundError:
            raise ValueError(text)  # noqa: B904  # as libraries do

    with pytest.raises(ValueError, match=text):
        write_whole(tmp_path / "file.bin", write)
