"""kill -9 at any moment leaves files that are whole or absent, and the same command goes on and clears up."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import killed
import numpy as np
import pytest
import torch
from killed import contents, in_child, killed_everywhere
from mpq_nncf import ir_export

from mpq_plugins.common.files import write_json
from mpq_plugins.common.partial import partial_folder
from mpq_plugins.common.tensor_files import write_tensors, write_torch
from mpq_plugins.errors import TrainingError
from mpq_plugins.proxies.measuring import keeping_measurements
from mpq_plugins.proxies.measuring.cache import MeasurementCache
from mpq_plugins.training.checkpoints import TrainingFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and locks")
STATE = dict.fromkeys(("stage", "epoch", "optimizer", "average", "scaler", "profit", "history"), 1)
WRITERS = {
    "json": lambda path, value: write_json(path, {"value": value}),
    "torch": lambda path, value: write_torch(path, {"value": torch.full((500,), value)}),
    "tensors": lambda path, value: write_tensors(path, {"value": np.full(500, value)}),
}

JOB = {"model": "a", "bits": {"fingerprint": "sha256:0", "layers": {"a": {"weight": 4, "activation": 8}}}}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path, kind):
    """At every touch of a file; what it left half done is hidden, and the next write into the folder removes it."""
    write, path = WRITERS[kind], tmp_path / "file"
    write(path, 2)
    new = path.read_bytes()
    write(path, 1)
    old = path.read_bytes()
    assert old != new
    hidden = 0
    for _ in killed_everywhere(lambda: write(path, 2)):
        assert path.read_bytes() in (old, new)
        hidden += len(list(tmp_path.glob(".mpq-partial-*")))
        write(path, 1)
        assert contents(tmp_path) == {"file": old}
    assert hidden


def test_the_same_content_has_the_same_bytes(tmp_path):
    """torch's archives hold the name of their file: it is the file's own, not a temporary one."""
    assert len({WRITERS["torch"](tmp_path / str(n) / "module.pt", 1).read_bytes() for n in range(2)}) == 1


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    """A folder in use is locked; only those of processes that are gone are cleared."""
    with partial_folder(tmp_path) as mine:
        (mine / "half").write_text("")
        assert in_child(lambda: write_json(tmp_path / "other.json", {})) == 0
        assert (mine / "half").exists()
    (tmp_path / ".mpq-partial-abandoned").mkdir()
    write_json(tmp_path / "other.json", {})
    assert list(contents(tmp_path)) == ["other.json"]
    assert not list(tmp_path.glob(".*"))


def test_a_killed_training_leaves_whole_checkpoints(tmp_path):
    """At every touch of a file the latest checkpoint is the old or the new one, whole, and the next one clears up."""
    folder, write = TrainingFolder(tmp_path), lambda path: write_torch(path, {"a": torch.ones(3)})
    wanted = ("epoch-0002", "epoch-0003")
    for _ in killed_everywhere(lambda: folder.save(3, write, STATE)):
        for checkpoint in folder._checkpoints():
            module, state = TrainingFolder.read(checkpoint)
            assert module.is_file()
            assert state["epoch"] == 1
        for number in (1, 2):
            folder.save(number, write, STATE)
    assert tuple(sorted(path.name for path in tmp_path.iterdir())) == wanted


def test_an_xml_file_is_never_beside_a_bin_file_of_another(tmp_path, monkeypatch):
    """OpenVINO's pair: at every touch of a file, whoever finds the .xml finds its own .bin."""

    def save_model(value, path, **_):
        path.write_text(str(value))
        path.with_suffix(".bin").write_text(str(value))

    monkeypatch.setattr(ir_export, "require", lambda *_: SimpleNamespace(save_model=save_model))
    path = tmp_path / "model.xml"
    ir_export._save_pair(1, path)
    for _ in killed_everywhere(lambda: ir_export._save_pair(2, path)):
        if path.exists():
            assert path.with_suffix(".bin").read_text() == path.read_text()
        ir_export._save_pair(1, path)
        assert contents(tmp_path) == {"model.xml": b"1", "model.bin": b"1"}


def test_one_process_trains_in_a_folder_at_a_time(tmp_path):
    """Another one is refused until the first is done; a killed one keeps nobody out."""

    def claim(folder):
        TrainingFolder(folder).claim(JOB)

    def refused():
        with pytest.raises(TrainingError, match="another process is training in"):
            claim(tmp_path)

    with TrainingFolder(tmp_path) as folder:
        folder.claim(JOB)
        assert in_child(refused) == 0
    assert in_child(functools.partial(claim, tmp_path)) == 0
    for _ in killed_everywhere(functools.partial(claim, tmp_path / "new")):
        pass
    claim(tmp_path / "new")


def test_processes_that_share_a_cache_read_whole_measurements(tmp_path):
    """While one writes and drops again and again, another finds an array as it was written, or none."""
    arrays = {"loss": np.arange(300.0)}

    def use(n_times=60):
        with keeping_measurements(tmp_path):
            journal = MeasurementCache({"run": 1})
        for _ in range(n_times):
            journal.put("a", arrays)
            found = journal.get("a")
            assert found is None or np.array_equal(found["loss"], arrays["loss"])
            journal.drop(["a"])

    pids = []
    for _ in range(2):
        pids.append(os.fork())
        if not pids[-1]:
            code = 1
            try:
                use()
                code = 0
            finally:
                os._exit(code)
    use()
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["identity.json"]


def test_commands_that_were_killed_go_on(tmp_path):
    """allocate, apply and export, killed in the middle and given again, leave the files of a run never killed."""
    script = [sys.executable, killed.__file__, str(tmp_path)]
    done = subprocess.run(script, env=dict(os.environ), capture_output=True, text=True, cwd=Path(killed.__file__).parent)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_lock_outlives_whoever_reads_the_folder(tmp_path):
    """Reading the job in the process that trains gives nothing away, and the same process cannot train there twice."""
    with TrainingFolder(tmp_path) as folder:
        folder.claim(JOB)
        (tmp_path / "job.json").read_text()
        with pytest.raises(TrainingError, match="already"):
            TrainingFolder(tmp_path).claim(JOB)
        assert in_child(functools.partial(refused, tmp_path)) == 0
    TrainingFolder(tmp_path).claim(JOB)


def refused(folder):
    """Whether another process is kept out of a folder."""
    with pytest.raises(TrainingError, match="another process"):
        TrainingFolder(folder).claim(JOB)
