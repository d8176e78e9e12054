"""Layers that a model calls by keyword are quantized as those it calls by position."""

import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.errors import AdapterError


class Net(nn.Module):
    """Two linear layers with a normalisation between, called in one way or the other."""

    def __init__(self, *, by_keyword: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)
        self.by_keyword = by_keyword

    def forward(self, x):
        for layer in (self.a, self.norm, self.b):
            x = layer(input=x) if self.by_keyword else layer(x)
        return x


@pytest.mark.parametrize(
    ("profile", "options"),
    [
        ("layerwise", {}),
        ("layerwise", {"rounding": "gptq"}),
        ("layerwise", {"rounding": "learned", "rounding_steps": 20}),
        ("finn", {"batch_norm": "re-estimated"}),
        ("finn", {"rounding": "gpfq"}),
        ("finn", {"equalization": "smooth-quant"}),
    ],
)
def test_keywords_change_nothing(profile, options):
    """The module equals that of the same network called by position, whose inputs are signed: 8 bits are 2 % off at most."""
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    outputs = []
    for by_keyword in (True, False):
        model = Net(by_keyword=by_keyword).eval()
        inventory = find_layers(model, x)
        bits = BitConfig({layer.name: Precision(8, 8) for layer in inventory}, inventory.fingerprint)
        module = BrevitasAdapter(profile=profile).prepare(model, bits, x, [x], **options)
        outputs.append(module(x).detach())
    assert torch.equal(*outputs)
    assert float((outputs[0] - model(x)).abs().mean() / model(x).std()) < 0.02


def test_a_keyword_of_a_subclass_of_its_own_is_refused():
    """A subclass that names its input otherwise and is called so cannot be replaced by Brevitas' layer: told beforehand."""

    class Named(nn.Linear):
        def forward(self, features):
            return nn.functional.linear(features, self.weight, self.bias)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Named(8, 4)

        def forward(self, x):
            return self.fc(features=x)

    model, x = Model().eval(), torch.randn(4, 8)
    inventory = find_layers(model, x)
    bits = BitConfig({"fc": Precision(8, 8)}, inventory.fingerprint)
    with pytest.raises(AdapterError, match="fc: Named is not called with one tensor by position"):
        BrevitasAdapter().prepare(model, bits, x, [x])
