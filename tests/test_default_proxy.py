"""What `allocate` takes when no score is named."""

import pytest
import torch
from torch import nn

import mpq_plugins as mpq
from mpq_plugins.allocation import proxy_of

NETS = {
    "classes": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 5)), "kl-divergence"),
    "one number": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 1)), "output-error"),
    "maps": (lambda: nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1)), "output-error"),
}


@pytest.mark.parametrize("name", NETS)
def test_class_logits_get_a_divergence_and_anything_else_a_squared_error(name):
    """The choice is by the form of the output, the images are 32, and what was taken stands in the bit configuration."""
    build, expected = NETS[name]
    torch.manual_seed(0)
    model = build().eval()
    images = torch.randn(40, 3, 2, 2)
    bits = mpq.allocate(model, images[:1], [images], budgets={"size": "w4"}, choices=mpq.menu((2, 4, 8))).bits
    assert bits.origin["proxy"]["name"] == expected
    assert bits.origin["proxy"]["n_images"] == 32
    assert bits.origin["proxy"]["correction"] is True
    assert proxy_of("auto", model, images[:1], options={"n_images": 8}).n_images == 8


def test_nothing_is_pinned_unless_asked():
    """A stem and a head are decided like all layers; asked to, both are held at w8a8."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    images = torch.randn(4, 3, 8, 8)
    assert not mpq.build_space(model, images[:1], choices=mpq.menu((2, 4))).pins
    held = mpq.build_space(model, images[:1], choices=mpq.menu((2, 4)), pin_first_last=True).pins
    assert held == {"0": "w8a8", "4": "w8a8"}
