"""A run that was stopped anywhere goes on to the very end that it would have had."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_cases as cases
from training_cases import PROFIT, QAT, Stopping, data, run, tensors, without_time

from mpq_plugins import MPQError
from mpq_plugins.errors import DataError, FormatError, TrainingError, WriteError
from mpq_plugins.training import Trained
from mpq_plugins.training.checkpoints import TrainingFolder

ADAPTERS = ("nncf", "brevitas")
RECIPES = {"qat": QAT, "profit": PROFIT, "corrected": replace(PROFIT, batch_norm="corrected")}


class Stop(Exception):
    """What the data of an interrupted run raise."""


def stop() -> None:
    raise Stop


@functools.cache
def whole(name: str, method: str) -> Trained:
    """A run that was never stopped, without a folder."""
    return run(name, RECIPES[method], evaluation=data())


def test_a_folder_of_release_0_1_is_gone_on_with(tmp_path):
    """Its job spelled precisions as texts: equal bits are the same job, other bits are told layer by layer."""
    job = {"bits": {"fingerprint": "sha256:0", "layers": {"0": {"weight": 4, "activation": 8}}}, "teacher": None}
    older = {"format": "mpq-training/1", "bits": {"fingerprint": "sha256:0", "layers": {"0": "w4a8"}}, "teacher": None}
    (tmp_path / "job.json").write_text(json.dumps(older))
    with TrainingFolder(tmp_path) as folder:
        folder.claim(job)
    job["bits"]["layers"]["0"]["weight"] = 3
    with TrainingFolder(tmp_path) as folder, pytest.raises(TrainingError, match=r"bits.layers.0.weight: 4 then, 3 now"):
        folder.claim(job)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run; for copies."""
    folder = tmp_path_factory.mktemp("finished")
    run("brevitas", QAT, folder=folder, evaluation=data())
    return folder


def stopped(name: str, method: str, at: int, folder: Path, do=stop) -> None:
    with pytest.raises(Stop):
        run(name, RECIPES[method], data=Stopping(data(), at, do), folder=folder, evaluation=data())


def assert_same(one: Trained, other: Trained) -> None:
    assert without_time(one.history) == without_time(other.history)
    assert one.instability == other.instability
    own, expected = one.module.state_dict(), other.module.state_dict()
    assert list(own) == list(expected)
    assert not [name for name, tensor in own.items() if not torch.equal(tensor, expected[name])]


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("method", "steps"), [("qat", (4,)), ("profit", (4, 15)), ("corrected", (7,))])
def test_a_stopped_run_ends_as_one_never_stopped(name, method, steps, tmp_path):
    """Stopped again and again, within epochs, at their ends and between stages, the weights are equal bit for bit."""
    for at in steps:
        stopped(name, method, at, tmp_path)
    assert_same(run(name, RECIPES[method], folder=tmp_path, evaluation=data()), whole(name, method))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_finished_run_is_found_again(name, tmp_path):
    """The same call after the end trains nothing and gives the same, what PROFIT measured included."""
    first = run(name, PROFIT, folder=tmp_path, evaluation=data())
    again = run(name, PROFIT, folder=tmp_path, evaluation=data(), data=Stopping(data(), 0, stop))
    assert_same(again, first)
    assert again.instability
    assert again.history == first.history


def test_a_killed_process_goes_on(tmp_path):
    """SIGKILL in the middle of an epoch of another process leaves a folder that ends as a run never killed."""
    script = [sys.executable, cases.__file__, "brevitas", str(tmp_path), "13"]
    assert subprocess.run(script, env=dict(os.environ)).returncode == -9
    assert sorted(path.name for path in tmp_path.glob("epoch-*")) == ["epoch-0003", "epoch-0004"]
    assert_same(run("brevitas", PROFIT, folder=tmp_path, evaluation=data()), whole("brevitas", "profit"))


def test_a_checkpoint_half_written_counts_for_nothing(tmp_path, monkeypatch):
    """Killed between the module and its state, the run goes on from the epoch before, and the debris goes."""
    monkeypatch.setattr("mpq_plugins.training.checkpoints._STATE", "missing/folder")  # no state can be written
    monkeypatch.setattr("mpq_plugins.common.partial.shutil.rmtree", lambda *_, **__: None)  # nor cleaned up
    monkeypatch.setattr("mpq_plugins.training.checkpoints.write_torch", lambda *_: stop())
    with pytest.raises(Stop):
        run("brevitas", QAT, folder=tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob(".mpq-partial-*/epoch-0001/*") if path.is_file()] == ["module.pt"]
    assert_same(run("brevitas", QAT, folder=tmp_path, evaluation=data()), whole("brevitas", "qat"))
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def test_a_loss_that_is_not_finite_stops_and_the_last_good_state_stays(tmp_path):
    """The error names step, batch, epoch and checkpoint; the run then goes on from it as if nothing had happened."""
    poison = data()[0].inputs.clone().fill_(float("nan"))
    batches = [data()[0], data()[1], (poison, data()[2].labels)]

    def poisoned(number):
        return batches if number == 1 else data()

    with pytest.raises(TrainingError) as error:
        run("brevitas", QAT, data=poisoned, folder=tmp_path, evaluation=data())
    text = str(error.value)
    assert "the loss is nan at step " in text
    assert "of 3, item 2 of the data, epoch 2 (training)" in text
    assert f"The last good checkpoint is {tmp_path / 'epoch-0001'}" in text
    assert_same(run("brevitas", QAT, folder=tmp_path, evaluation=data()), whole("brevitas", "qat"))


@pytest.mark.parametrize(("factor", "fact"), [(float("nan"), "that are not finite"), (1e12, r"up to \d\.\de\+\d\d")])
def test_weights_that_training_broke_are_never_kept(tmp_path, factor, fact):
    """What gradients break while the loss stays as it is is told before it becomes a checkpoint."""

    def loss(result, batch):
        value = torch.nn.functional.cross_entropy(result, batch.labels)
        value.register_hook(lambda gradient: gradient * factor)
        return value

    with pytest.raises(TrainingError, match=rf"holds values {fact} after epoch 1\. No checkpoint was kept yet"):
        run("brevitas", replace(QAT, clip_norm=None), data=data(1), loss=loss, folder=tmp_path)
    assert not list(tmp_path.glob("epoch-*"))


def test_another_job_is_refused(finished):
    """A folder of another recipe is left alone, and the error names both values."""
    before = (finished / "job.json").read_text()
    with pytest.raises(TrainingError, match=r"recipe\.learning_rate: 0\.05 then, 0\.01 now"):
        run("brevitas", replace(QAT, learning_rate=0.01), folder=finished)
    with pytest.raises(TrainingError, match="teacher: None then, 'Net' now"):
        run("brevitas", QAT, folder=finished, teacher=cases.net())
    with pytest.raises(TrainingError, match=r"calibration\.images: 48 then, 24 now"):
        run("brevitas", QAT, calibration=data(batch_size=8), folder=finished)
    assert (finished / "job.json").read_text() == before


@pytest.mark.parametrize("file", ["training.pt", "module.pt"])
def test_a_damaged_checkpoint_is_named(file, finished, tmp_path):
    """A cut-off file is told with what to delete; after that the run goes on from the checkpoint before."""
    folder = shutil.copytree(finished, tmp_path / "run")
    latest = folder / "epoch-0003"
    (latest / file).write_bytes((latest / file).read_bytes()[:100])
    with pytest.raises(FormatError, match="Delete it to go on from the one before it") as error:
        run("brevitas", QAT, folder=folder)
    assert str(latest) in str(error.value)
    shutil.rmtree(latest)
    assert_same(run("brevitas", QAT, folder=folder, evaluation=data()), whole("brevitas", "qat"))


def test_metrics_stand_once(tmp_path):
    """Each epoch has one line and one point in TensorBoard, stopped or not, as the records say."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Stop):
        run("brevitas", QAT, data=Stopping(data(), 7, stop), folder=tmp_path, evaluation=data(), tensorboard=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3}\n')  # of an epoch that was killed before its checkpoint
    trained = run("brevitas", QAT, folder=tmp_path, evaluation=data(), tensorboard=True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["loss"]) for line in lines] == [(r.epoch, r.loss) for r in trained.history]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [
        (r.steps, pytest.approx(r.loss, rel=1e-6)) for r in trained.history
    ]
    assert len(board.Scalars("accuracy")) == 3


def test_an_unusable_folder_is_told_before_anything_is_trained(tmp_path):
    """A folder that cannot be made is an error of ours, and so is TensorBoard without a folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError):
        run("brevitas", QAT, folder=tmp_path / "file" / "run", data=Stopping(data(), 0, stop))
    with pytest.raises(TrainingError, match="need a folder"):
        run("brevitas", QAT, tensorboard=True)


def test_an_interrupted_run_leaves_everything_as_it_was():
    """Ctrl-C in an epoch: the user's model, its modes and all random numbers are what they were."""
    model = cases.net()
    before = {name: tensor.clone() for name, tensor in tensors(model)}
    state = torch.get_rng_state()

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("brevitas", QAT, model=model, data=Stopping(data(), 4, interrupt))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_data_that_cannot_be_trained_on_are_told():
    """Unlabelled, empty and unsized data, and a lone image before batch normalisation, are errors that say what to do."""
    wrong = {
        "has no labels": [batch.inputs for batch in data()],
        "are empty": [],
        "do not say how many": lambda number: iter(data()),
    }
    for text, batches in wrong.items():
        with pytest.raises(DataError, match=text):
            run("brevitas", QAT, data=batches, calibration=() if not batches else data())
    with pytest.raises(DataError, match="has one image"):
        run("brevitas", QAT, data=[(data()[0].inputs[:1, :, :1, :1].repeat(1, 1, 2, 2), data()[0].labels[:1])])
    assert issubclass(DataError, MPQError)
