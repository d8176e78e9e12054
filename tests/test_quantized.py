"""The handle of a quantized model: one call makes it; it can be pickled, copied, wrapped, trained, saved and exported."""

import copy
import json
import pickle

import pytest
import torch
from command import run
from torch import nn
from torch.optim.swa_utils import AveragedModel

import mpq_plugins as mpq
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.adapter.checkpoint import read_origin
from mpq_plugins.errors import AdapterError, DataError, MPQError, VerificationError
from mpq_plugins.training import TrainingRecipe

IMAGES = torch.randn(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELLED = [(part, torch.arange(len(part)) % 10) for part in IMAGES.split(16)]
SUFFIX = {"nncf": ".xml", "brevitas": ".onnx"}

NET = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )
"""


def network():
    """The one of NET, with statistics of its own."""
    scope = {}
    exec(NET, scope)
    net = scope["build"]()
    with torch.no_grad():
        for _ in range(3):
            net.train()(IMAGES)
    return net.eval()


@pytest.fixture(scope="module", params=list(SUFFIX))
def handle(request):
    return mpq.quantize(network(), IMAGES, budgets="size=w4", adapter=request.param, choices=(2, 4, 8))


def outputs(run):
    with torch.no_grad():
        return run(IMAGES[:4])


def test_the_file_holds_what_was_allocated(handle, tmp_path):
    """Bits, codes, outputs and the budget, read back; accuracy of the file is the module's."""
    exported = handle.export(tmp_path / f"net{SUFFIX[handle.adapter.name]}")
    found = exported.verify()
    assert found.ok
    assert [check.name for check in found.budgets] == ["size"]
    assert exported.read_bits() == handle.bits == handle.allocation.bits
    assert exported.accuracy(LABELLED) == pytest.approx(handle.accuracy(LABELLED), abs=0.05)
    assert torch.as_tensor(exported.run(IMAGES[:4])[0]) == pytest.approx(outputs(handle), abs=1e-3)


def test_a_file_of_other_bits_fails(handle, tmp_path):
    """The handle was switched after the export."""
    copied = copy.deepcopy(handle)
    exported = copied.export(tmp_path / f"net{SUFFIX[handle.adapter.name]}")
    copied.set_bits(mpq.BitConfig(dict.fromkeys(handle.bits.layers, "w8a8"), handle.bits.fingerprint), IMAGES)
    assert copied.bits != handle.bits
    with pytest.raises(VerificationError, match="asked for w8a8, the file holds"):
        exported.verify()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(handle, again):
    """Same outputs and bits; what is changed in one stays as it was in the other."""
    before, other = outputs(handle), again(handle)
    assert torch.equal(outputs(other), before)
    assert other.bits == handle.bits
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(1)
    assert torch.equal(outputs(handle), before)


def distributed(module):
    """One process, on the CPU."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(module)


WRAPPERS = {
    "DDP": distributed,
    "EMA": lambda module: AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)),
    "compile": lambda module: torch.compile(module, backend="eager"),
    "sequence": nn.Sequential,
    "two": lambda module: nn.Sequential(nn.Sequential(module)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_modules_keep_their_bits(handle, name, tmp_path):
    """They run, and what adapters are asked for is done to the module inside."""
    module = copy.deepcopy(handle.module)
    try:
        wrapped = WRAPPERS[name](module)
        if (handle.adapter.name, name) != ("nncf", "compile"):  # torch.compile cannot trace NNCF's hooks
            assert outputs(wrapped) == pytest.approx(outputs(handle), abs=1e-5)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert bits_of(wrapped) == handle.bits
    path = handle.adapter.export(wrapped, tmp_path / f"net{SUFFIX[handle.adapter.name]}", handle.example)
    assert handle.adapter.read_bits(path) == handle.bits


def test_a_sequence_that_does_more_is_not_taken_for_the_module(handle):
    """A softmax behind the module would be missing in the file."""
    with pytest.raises(AdapterError, match="was not made by"):
        bits_of(nn.Sequential(handle.module, nn.Softmax(dim=1)))


def test_a_checkpoint_knows_adapter_and_example(handle, tmp_path):
    """Loaded with nothing but the float model; another model is refused."""
    path = handle.save(tmp_path / "module.pt")
    loaded = mpq.QuantizedModel.load(path, handle.model)
    assert torch.equal(outputs(loaded), outputs(handle))
    assert (loaded.adapter, loaded.bits) == (handle.adapter, handle.bits)
    assert torch.equal(loaded.example, handle.example)
    with pytest.raises(MPQError):
        mpq.QuantizedModel.load(path, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def test_a_checkpoint_of_an_adapter_needs_an_example(handle, tmp_path):
    """`adapter.save` alone does not know the example, as all files of before."""
    again = handle.adapter.load(handle.model, handle.save(tmp_path / "known.pt"), handle.example)
    path = handle.adapter.save(again, tmp_path / "module.pt")
    assert read_origin(path) == (handle.adapter.name, None)
    with pytest.raises(AdapterError, match="Give example="):
        mpq.QuantizedModel.load(path, handle.model)
    assert mpq.QuantizedModel.load(path, handle.model, example=handle.example).bits == handle.bits


@pytest.mark.parametrize(
    "origin",
    [7, "[]", "{}", '{"options": [], "command": {}}', '{"options": {}, "command": 3}', '{"options": {"a": 1}, "command": {}}'],
)
def test_a_damaged_origin_is_told(handle, origin, tmp_path):
    """No value in a file ends in another library's error."""
    document = torch.load(handle.save(tmp_path / "module.pt"), weights_only=True)
    torch.save({**document, "origin": origin}, tmp_path / "other.pt")
    with pytest.raises(MPQError):
        mpq.QuantizedModel.load(tmp_path / "other.pt", handle.model)


def test_another_kind_of_file_is_told_as_that(handle, tmp_path):
    """A bit configuration given for a checkpoint, by a slip of the hand, holds no code."""
    path = handle.bits.save(tmp_path / "bits.json")
    with pytest.raises(MPQError, match="does not begin as torch's files do"):
        mpq.QuantizedModel.load(path, handle.model)


def test_training_goes_on_in_the_handle(handle):
    """From the float model on, at the handle's bits; the loss falls."""
    copied = copy.deepcopy(handle)
    trained = copied.train(LABELLED, TrainingRecipe(epochs=3, learning_rate=0.05))
    assert copied.module is trained.module
    assert copied.bits == handle.bits
    assert trained.history[-1].loss < trained.history[0].loss


def test_data_as_people_have_it():
    """A tensor, a list of batches and a loader of the same images give the same bits; a single row of numbers is refused."""
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(IMAGES, torch.zeros(48, dtype=torch.long)), batch_size=32
    )
    forms = [IMAGES, list(IMAGES.split(32)), loader]
    found = [
        mpq.quantize(network(), data, budgets={"size": "w4"}, adapter="brevitas", choices=(2, 4, 8)).bits for data in forms
    ]
    assert found[0] == found[1] == found[2]
    with pytest.raises(DataError, match="no rows"):
        mpq.quantize(network(), torch.zeros(3), budgets="size=w4", adapter="brevitas")


def test_wrong_options_are_refused_before_anything_is_scored(monkeypatch):
    """An option of post-training quantization that does not exist."""
    monkeypatch.setattr("mpq_plugins.quantized.allocate", lambda *_, **__: pytest.fail("scored"))
    with pytest.raises(MPQError, match="roundin"):
        mpq.quantize(network(), IMAGES, budgets="size=w4", adapter="brevitas", ptq={"roundin": "gptq"})


def test_no_plan_to_keep_is_refused_before_anything_is_scored(monkeypatch):
    """`top_k` counts from one."""
    monkeypatch.setattr("mpq_plugins.allocation.Search.scores", lambda _: pytest.fail("scored"))
    with pytest.raises(MPQError, match="top_k is 0"):
        mpq.quantize(network(), IMAGES, budgets="size=w4", adapter="brevitas", top_k=0)


def test_it_is_told_in_few_lines(handle):
    """Neither repr nor report floods a terminal."""
    assert len(repr(handle)) < 200
    assert "3 layers" in repr(handle)
    assert len(handle.report.splitlines()) < 20


@pytest.mark.parametrize("adapter", SUFFIX)
def test_commands_need_nothing_that_files_say(adapter, tmp_path, monkeypatch, capsys):
    """Model, data, adapter and its options stand in the bit configuration and in the module; the file tells its adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    options = ["--adapter-option", "profile=finn"] if adapter == "brevitas" else ["--adapter-option", "asymmetric=false"]
    told = ["--model", "net.py:build", "--data", "digits", "--adapter", adapter, *options, "--images", "64"]
    out = f"net{SUFFIX[adapter]}"
    for words in (
        ["allocate", *told, "--budget", "size=w4", "--out", "bits.json"],
        ["apply", "bits.json", "--images", "64"],
        ["export", "module.pt", "--out", out, "--evaluate"],
        ["verify", out, "bits.json"],
    ):
        code, _, err = run(capsys, *words)
        assert code == 0, err
    assert json.loads((tmp_path / "bits.json").read_text())["origin"]["command"]["adapter"] == adapter


@pytest.mark.parametrize("spec", ["os:abort", "/usr/net.py:build", "../net.py:build", 3])
def test_files_do_not_choose_the_code_that_runs(spec, tmp_path, monkeypatch, capsys):
    """A bit configuration from elsewhere may name neither modules nor files outside the working folder."""
    monkeypatch.chdir(tmp_path)
    bits = mpq.BitConfig({"0": "w4a8"}, "sha256:0", {"command": {"model": spec, "adapter": "brevitas"}})
    bits.save("bits.json")
    code, _, err = run(capsys, "apply", "bits.json")
    assert code == 2
    assert "does not say which model it is for. Add --model" in err
