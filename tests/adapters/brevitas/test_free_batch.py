"""Layerwise files take any number of images, files for FINN one."""

import onnx
import onnxruntime
import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify


class Biased(nn.Module):
    """Images and something that all of them share, flattened by the images' own number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(64, 5)

    def forward(self, x, shift):
        return self.fc(torch.relu(self.conv(x) + shift).view(x.size(0), -1))


def _exported(adapter, format, path):
    torch.manual_seed(0)
    model, inputs = Biased().eval(), (torch.randn(6, 3, 6, 6), torch.randn(4, 1, 1))
    if adapter.profile == "finn":
        model, inputs = nn.Sequential(model.conv, nn.ReLU(), nn.Flatten(), model.fc).eval(), inputs[0]
    inventory = find_layers(model, inputs)
    bits = BitConfig({layer.name: Precision(3, 8) for layer in inventory}, inventory.fingerprint)
    module = adapter.prepare(model, bits, inputs, [(inputs, None)])
    return bits, module, inputs, adapter.export(module, path / "net.onnx", inputs, format=format)


def _first_axis(path):
    return [value.type.tensor_type.shape.dim[0].dim_param or value.type.tensor_type.shape.dim[0].dim_value
            for value in (*onnx.load(path).graph.input, *onnx.load(path).graph.output)]  # fmt: skip


@pytest.mark.parametrize("format", BrevitasAdapter.formats)
def test_layerwise(format, tmp_path):
    """The axis of images is free, that of what they share is not; 6 images and 1 give the module's outputs in one run."""
    adapter = BrevitasAdapter()
    bits, module, inputs, path = _exported(adapter, format, tmp_path)
    first = _first_axis(path)
    assert first[:2] == ["batch", 4]
    assert isinstance(first[2], str)
    report = verify(adapter, path, bits, module=module, inputs=inputs, tolerance=1e-5).check()
    assert report.outputs.batch_sizes == (6, 1)
    if format == "qcdq":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        images = torch.randn(7, 3, 6, 6)
        found = session.run(None, {"input_0": images.numpy(), "input_1": inputs[1].numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(found), module(images, inputs[1]).detach(), rtol=0, atol=1e-4)


def test_finn_has_every_size(tmp_path):
    """FINN's passes need every size, so its files hold one image."""
    _, _, _, path = _exported(BrevitasAdapter(profile="finn"), "qonnx", tmp_path)
    assert _first_axis(path) == [1, 1]
