"""The options of post-training quantization: what is refused before any work is done."""

import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from torch import nn

from mpq_plugins import PTQ, BitConfig, Precision, find_layers
from mpq_plugins.errors import AdapterError


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rounding": "gtpq"}, "rounding must be one of nearest, gptq, gpfq, qronos, learned, not 'gtpq'"),
        ({"rouding": "gptq"}, "no option 'rouding'; it has weight_range"),
        ({"bias_correction": "false"}, "bias_correction must be true or false, not 'false'"),
        ({"rounding_steps": 0}, "rounding_steps must be a whole number of at least 1, not 0"),
        ({"batch_norm": "moved"}, "batch_norm must be one of corrected, re-estimated, kept, not 'moved'"),
        ({"held_out": -1}, "held_out must be a whole number of at least 0, not -1"),
        ({"rounding_steps": 1e3}, "rounding_steps must be a whole number of at least 1, not 1000.0"),
    ],
)
def test_wrong_options_are_told(options, told):
    """The value, and what it could be."""
    with pytest.raises(AdapterError, match=told):
        PTQ.of(options)


def test_known_options_are_kept():
    """Keyword options become fields, the others keep their defaults."""
    assert PTQ.of({"rounding": "gptq", "batch_norm": "kept"}) == PTQ(rounding="gptq", batch_norm="kept")


@pytest.mark.parametrize(("switch", "meant"), [(True, "re-estimated"), (False, "kept")])
def test_the_switch_of_release_0_1_is_still_read(switch, meant):
    """Checkpoints and scripts of the first release name `bn_reestimation`."""
    assert PTQ.of({"bn_reestimation": switch}) == PTQ(batch_norm=meant)


def test_a_shared_weight_has_one_rounding():
    """Two layers that share a weight would each choose its codes: refused by name."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).relu())

    model, x = Tied().eval(), torch.randn(8, 4)
    inventory = find_layers(model, x)
    bits = BitConfig({layer.name: Precision(4, 8) for layer in inventory}, inventory.fingerprint)
    with pytest.raises(AdapterError, match="weight that first and second share"):
        BrevitasAdapter().prepare(model, bits, x, [x], rounding="gptq")
