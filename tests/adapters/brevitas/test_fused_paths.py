"""torch's fused encoder kernel reads weights and calls no layer: quantized layers must be what runs, in every mode."""

import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify
from mpq_plugins.errors import AdapterError, VerificationError


class Masked(nn.Module):
    """A stack of encoder layers that is told where the padding is."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x, mask):
        return self.encoder(x, src_key_padding_mask=mask)


def _case(masked):
    torch.manual_seed(0)
    x, mask = torch.randn(4, 6, 16), torch.zeros(4, 6, dtype=torch.bool)
    if not masked:
        return nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0).eval(), x
    mask[1:, 4:] = True  # left-aligned padding: torch would make nested tensors of it
    return Masked().eval(), (x, mask)


def _bits(model, example):
    inventory = find_layers(model, example)
    return BitConfig({layer.name: Precision(2, 4) for layer in inventory}, inventory.fingerprint)


@pytest.mark.parametrize("masked", [False, True])
def test_without_gradients_the_quantized_layers_run(masked, tmp_path):
    """Evaluation without gradients equals evaluation with them, which never is fused, and equals the file."""
    model, example = _case(masked)
    adapter, bits = BrevitasAdapter(), _bits(model, example)
    module = adapter.prepare(model, bits, example, [(example, None)])
    inputs = example if masked else (example,)
    with torch.no_grad():
        found = module(*inputs)
    torch.testing.assert_close(found, module(*inputs).detach(), rtol=0, atol=1e-5)  # float attention alone may be fused
    path = adapter.export(module, tmp_path / "net.onnx", example)
    report = verify(adapter, path, bits, module=module, inputs=example, tolerance=1e-5).check()
    assert report.outputs.watched_difference == 0.0


def test_verification_tells_a_module_that_skips_its_layers(tmp_path):
    """With the fused kernel back on, noise at the layers moves the module as well; that is no excuse for the file."""
    model, example = _case(masked=False)
    adapter, bits = BrevitasAdapter(), _bits(model, example)
    module = adapter.prepare(model, bits, example, [example])
    path = adapter.export(module, tmp_path / "net.onnx", example)
    module.activation_relu_or_gelu = 1  # as torch sets it for ReLU
    with pytest.raises(VerificationError, match="does not run its quantized layers"):
        verify(adapter, path, bits, module=module, inputs=example).check()


def test_finn_refuses_layers_that_tracing_takes_whole():
    """Layers inside torch's encoder cannot be replaced in a traced graph: told by name, before anything is prepared."""
    model, example = _case(masked=True)
    adapter = BrevitasAdapter(profile="finn")
    reasons = adapter.unconvertible(model, find_layers(model, example), example)
    assert set(reasons) == {f"encoder.layers.{index}.linear{part}" for index in (0, 1) for part in (1, 2)}
    with pytest.raises(AdapterError, match="part of TransformerEncoder, which graph tracing takes whole"):
        adapter.prepare(model, _bits(model, example), example, [(example, None)])
