"""Negative padding of whole models through the adapters."""

from __future__ import annotations

import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas.options import options_of
from mpq_nncf import NNCFAdapter, nncf_quantizers
from mpq_nncf.wiring import wiring_of
from nncf_nets import images
from small_nets import InvertedResidual
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify
from mpq_plugins.training import with_negative_padding

READERS = ("block.depthwise.conv", "block.project.conv", "head")


class Small(nn.Module):
    """A hard-swish block of MobileNetV3 without squeeze-excite, and a classifier behind one more hard swish."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act = InvertedResidual(3, 8, 12, 2, kernel=5, act=nn.Hardswish), nn.Hardswish()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.act(self.block(x)).mean((2, 3)))


def signed_readers(adapter, module: nn.Module) -> list[bool]:
    """Whether the layers that read hard swishes have signed input quantizers."""
    if isinstance(adapter, BrevitasAdapter):
        return [options_of(module).signed[name] for name in READERS]
    places = [wiring_of(module)[name].activation[0] for name in READERS]
    return [nncf_quantizers.activation_kind(nncf_quantizers.quantizer_at(module, place)).signed for place in places]


@pytest.mark.parametrize("new", [NNCFAdapter, BrevitasAdapter], ids=["nncf", "brevitas"])
def test_rewritten_inputs_are_unsigned(new, tmp_path):
    """Readers of shifted hard swishes get unsigned quantizers, of plain ones signed; every format of the result is verified."""
    torch.manual_seed(0)
    adapter, model, data = new(), Small().eval(), images(16)[0]
    inventory = find_layers(model, data[:2])
    bits = BitConfig({layer.name: Precision(4, 4) for layer in inventory}, inventory.fingerprint)
    assert signed_readers(adapter, adapter.prepare(model, bits, data[:2], [data])) == [True] * 3
    padded = with_negative_padding(model, data[:2])
    assert padded.rewritten == ("block.expand.act", "block.depthwise.act", "act")
    module = adapter.prepare(padded.model, bits, data[:2], [data])
    assert signed_readers(adapter, module) == [False] * 3
    for format in adapter.formats:
        path = adapter.export(
            module, tmp_path / f"{format}.onnx" if adapter.name == "brevitas" else tmp_path / format, data[:2], format=format
        )
        assert verify(adapter, path, bits, module=module, inputs=data[:4]).check().ok
