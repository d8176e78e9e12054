"""Parameters that a quantized layer shares with something in float: the file must keep both as the module has them."""

import pytest
import torch
from mpq_nncf import NNCFAdapter
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify


class Tied(nn.Module):
    """A language model's head that is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.relu(self.fc(self.embedding(tokens))))


class TiedAutoencoder(nn.Module):
    """A decoder that is the transpose of the encoder's weight, in float."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 6)

    def forward(self, x):
        return torch.relu(self.encoder(x)) @ self.encoder.weight


@pytest.mark.parametrize("format", NNCFAdapter.formats)
@pytest.mark.parametrize("model", [Tied, TiedAutoencoder])
def test_the_float_reader_keeps_its_weights(model, format, tmp_path):
    """At 3 bits the float weights are far from the quantized ones; file and module agree within 1e-5 all the same."""
    torch.manual_seed(0)
    net = model().eval()
    inputs = torch.randint(0, 12, (16, 5)) if model is Tied else torch.randn(16, 8)
    inventory, adapter = find_layers(net, inputs), NNCFAdapter()
    bits = BitConfig({layer.name: Precision(3, 8) for layer in inventory}, inventory.fingerprint)
    module = adapter.prepare(net, bits, inputs, [inputs])
    path = adapter.export(module, tmp_path / "net", inputs, format=format)
    report = verify(adapter, path, bits, module=module, inputs=inputs, tolerance=1e-5).check()
    assert report.outputs.own_difference == 0.0
