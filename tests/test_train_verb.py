"""`mpq train` from the command line, and the training data it names."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from mpq_plugins import BitConfig, Precision, find_layers, verify
from mpq_plugins.adapter.evaluate import accuracy, exported_accuracy
from mpq_plugins.cli.parser import main
from mpq_plugins.cli.training_sources import calibration_data, shifted_digits, training_data
from mpq_plugins.digits import digits
from mpq_plugins.errors import DataError
from mpq_plugins.training import TrainingRecipe

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a network, its bits and a short recipe."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    from mpq_plugins.cli.sources import load_model

    model = load_model("net.py:Net")
    inventory = find_layers(model, digits(train=True)[0].inputs[:1])
    BitConfig({layer.name: Precision(3, 4) for layer in inventory}, inventory.fingerprint).save("bits.json")
    TrainingRecipe(epochs=9, learning_rate=0.05).save("recipe.json")
    return tmp_path


WORDS = ["train", "bits.json", "--model", "net.py:Net", "--data", "digits", "--adapter", "brevitas", "--quiet"]


def test_a_trained_module_is_exported_and_its_file_is_as_accurate(folder, capsys):
    """Recipe, overrides, metrics, plot; the accuracy printed is that of the module read back, and of the exported file."""
    words = [*WORDS, "--recipe", "recipe.json", "--epochs", "2", "--eval-data", "digits", "--plot", "run.png", "--json"]
    assert main([*words, "--teacher", "float"]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert "epoch 2/2" in captured.err
    assert len(result["epochs"]) == len(Path("mpq-train/metrics.jsonl").read_text().splitlines()) == 2
    assert Path("run.png").read_bytes()[:4] == b"\x89PNG"
    export = ["export", "mpq-train/module.pt", "--model", "net.py:Net", "--data", "digits", "--adapter", "brevitas"]
    assert main([*export, "--out", "net.onnx", "--evaluate", "--json", "--quiet"]) == 0
    exported = json.loads(capsys.readouterr().out)
    assert exported["accuracy"] == result["accuracy"]
    assert abs(exported["exported_accuracy"] - exported["accuracy"]) < 0.002


def test_data_by_epoch_and_a_named_output_go_through_training_and_export(folder, capsys):
    """The example comes from the first epoch, the accuracy of the file from the output that the name stands for."""
    Path("data.py").write_text(
        "from mpq_plugins.digits import digits\n\n"
        "def by_epoch(epoch):\n    return digits(train=True, batch_size=64 + epoch)[:4]\n"
    )
    Path("named.py").write_text(
        NET.replace("return self.fc(", "return {'image': x, 'logits': self.fc(").replace("mean((2, 3)))", "mean((2, 3)))}")
    )
    words = ["--model", "named.py:Net", "--adapter", "brevitas", "--output", "logits", "--quiet"]
    assert main(["train", "bits.json", *words, "--data", "data.py:by_epoch", "--epochs", "2"]) == 0
    exported = ["export", "mpq-train/module.pt", *words, "--data", "digits", "--out", "net.onnx", "--evaluate", "--json"]
    capsys.readouterr()
    assert main(exported) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exported_accuracy"] == pytest.approx(result["accuracy"], abs=0.002)


def test_exported_accuracy_counts_what_the_file_says(folder):
    """Against argmax over the outputs of the runtime, image by image."""
    from mpq_brevitas import BrevitasAdapter

    from mpq_plugins.cli.sources import load_model

    adapter, bits, batches = BrevitasAdapter(), BitConfig.load("bits.json"), digits(train=False)[:2]
    module = adapter.prepare(load_model("net.py:Net"), bits, batches[0].inputs[:1], batches)
    path = adapter.export(module, "net.onnx", batches[0].inputs[:1])
    right = sum(
        int(adapter.run(path, image[None])[0].argmax()) == int(label)
        for batch in batches
        for image, label in zip(batch.inputs, batch.labels, strict=True)
    )
    assert exported_accuracy(adapter, path, batches) == right / sum(len(batch) for batch in batches)
    assert verify(adapter, path, bits, module=module, inputs=batches[0].inputs).ok
    assert exported_accuracy(adapter, path, batches) == accuracy(module, batches)


def test_wrong_use_is_told(folder, capsys):
    """Missing data, a recipe with an unknown key, and an unknown option of PTQ: exit code 2 and the next step."""
    assert main(["train", "bits.json", "--model", "net.py:Net", "--input", "1x1x8x8", "--adapter", "nncf"]) == 2
    assert "Add --data" in capsys.readouterr().err
    document = json.loads(Path("recipe.json").read_text())
    Path("recipe.json").write_text(json.dumps({**document, "learnin_rate": 1}))
    assert main([*WORDS, "--recipe", "recipe.json"]) == 2
    assert "learnin_rate" in capsys.readouterr().err
    assert main([*WORDS, "--ptq", "rouding=gptq"]) == 2
    assert "rounding" in capsys.readouterr().err


def test_digits_differ_between_epochs_and_not_between_runs():
    """Shifted by at most a pixel, other shifts in every epoch, the same ones each time; never a test image."""
    first, again, second = shifted_digits(3), shifted_digits(3), shifted_digits(4)
    assert all(torch.equal(one.inputs, other.inputs) for one, other in zip(first, again, strict=True))
    assert any(not torch.equal(one.inputs, other.inputs) for one, other in zip(first, second, strict=True))
    plain = digits(train=True)
    for shifted, batch in zip(first, plain, strict=True):
        rolled = [torch.roll(batch.inputs, (down, right), (2, 3)) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        assert any(torch.equal(shifted.inputs, images) for images in rolled)


def test_an_image_folder_is_shuffled_and_augmented(tmp_path):
    """Batches of random crops in another order each time, incomplete batches left out; calibration has no random crops."""
    torchvision = pytest.importorskip("torchvision")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(5):
            image = torch.randint(0, 255, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
            torchvision.io.write_png(image, str(tmp_path / name / f"{index}.png"))
    spec = f"imagefolder:{tmp_path}"
    loader = training_data(spec, size=(32, 32), batch_size=4, workers=0)
    assert len(loader) == 2
    passes = [torch.cat([images for images, _ in loader]) for _ in range(2)]
    assert passes[0].shape == (8, 3, 32, 32)
    assert not torch.equal(*passes)
    calibration = [calibration_data(spec, 6, size=(32, 32), batch_size=4) for _ in range(2)]
    assert [len(batch) for batch in calibration[0]] == [4, 4]
    assert torch.equal(calibration[0][0].inputs, calibration[1][0].inputs)
    with pytest.raises(DataError, match="fewer than one batch of 128"):
        training_data(spec, size=(32, 32), workers=0)
    with pytest.raises(DataError, match="no image folder"):
        training_data("imagefolder:nowhere")


def test_user_data_may_be_a_loader_a_function_or_a_function_of_the_epoch(tmp_path, monkeypatch):
    """Each is what `train` takes: something with a length, or a function of the epoch."""
    monkeypatch.chdir(tmp_path)
    Path("data.py").write_text(
        "import torch\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "loader = DataLoader(TensorDataset(torch.zeros(6, 1), torch.zeros(6)), 3)\n"
        "def build(batch_size=2):\n    return [(torch.zeros(batch_size, 1), torch.zeros(batch_size))]\n"
        "def by_epoch(epoch):\n    return [(torch.full((2, 1), float(epoch)), torch.zeros(2))]\n"
    )
    assert isinstance(training_data("data.py:loader"), DataLoader)
    assert len(training_data("data.py:build")) == 1
    assert training_data("data.py:by_epoch")(5)[0][0][0] == 5
    assert len(calibration_data("data.py:loader", 4)) == 2


def test_negative_padding_goes_through_every_verb(folder, capsys):
    """A hard swish in front of a convolution gets an unsigned quantizer, the file verifies; without one a note is printed."""
    Path("swish.py").write_text(
        NET.replace(
            "nn.Linear(8, 10)\n", "nn.Linear(8, 10)\n        self.act, self.mix = nn.Hardswish(), nn.Conv2d(8, 8, 3, 1, 1)\n"
        ).replace("self.norm(self.conv(x)).relu()", "self.mix(self.act(self.norm(self.conv(x))))")
    )
    from mpq_plugins.cli.sources import load_model

    inventory = find_layers(load_model("swish.py:Net"), digits(train=True)[0].inputs[:1])
    BitConfig({layer.name: Precision(8, 8) for layer in inventory}, inventory.fingerprint).save("swish.json")
    common = ["--model", "swish.py:Net", "--data", "digits", "--adapter", "brevitas", "--quiet", "--negative-padding"]
    assert main(["apply", "swish.json", *common]) == 0
    state = torch.load("module.pt", weights_only=True)
    assert json.loads(state["recipe"])["signed"] == {"conv": True, "mix": False, "fc": True}
    assert main(["export", "module.pt", *common, "--out", "swish.onnx"]) == 0
    capsys.readouterr()
    assert main(["apply", "bits.json", "--model", "net.py:Net", *common[2:]]) == 0
    assert "finds no hard swish" in capsys.readouterr().err
