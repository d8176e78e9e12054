"""The folded convolution against one that really pads with -3/8, position by position."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq_plugins.errors import ModelError
from mpq_plugins.training import HARDSWISH_OFFSET, DuQ, Shifted, folded_offset, negatively_padded, with_offset_in_bias

LAYERS = {
    "dense": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "no bias": lambda: nn.Conv2d(6, 4, 3, padding=1, bias=False),
    "depthwise": lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False),
    "grouped, strided": lambda: nn.Conv2d(6, 4, 3, stride=2, padding=1, groups=2),
    "dilated": lambda: nn.Conv2d(6, 4, 3, padding=2, dilation=2),
    "uneven": lambda: nn.Conv2d(6, 4, (1, 4), padding=(0, 3)),
    "same": lambda: nn.Conv2d(6, 4, 4, padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(6, 4, 3, padding="valid"),
    "pointwise": lambda: nn.Conv2d(6, 4, 1),
}


def _hardswish_output(*shape):
    return F.hardswish(3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", LAYERS)
def test_folded_equals_explicit_at_borders_too(name):
    """Shifted input, zero padding and the constant in the bias give the explicit result to 1e-5 everywhere."""
    torch.manual_seed(0)
    layer, x = LAYERS[name](), _hardswish_output(2, 6, 9, 8)
    quantizer = Shifted(DuQ(4, signed=False))
    quantizer.quantizer.calibrate_activation(x + HARDSWISH_OFFSET)
    weight = torch.round(layer.weight.detach() * 8) / 8
    explicit = negatively_padded(layer, quantizer(x), weight)
    folded = with_offset_in_bias(layer, weight)
    folded.weight = nn.Parameter(weight)
    torch.testing.assert_close(folded(quantizer.quantizer(x + HARDSWISH_OFFSET)), explicit, rtol=0, atol=1e-5)


def test_explicit_padding_is_checked_by_hand():
    """A 3x3 kernel of ones in the corner of a zero image sees five borders of -3/8; zeros inside change nothing."""
    layer = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    weight = torch.ones(1, 1, 3, 3)
    result = negatively_padded(layer, torch.zeros(1, 1, 3, 3), weight)[0, 0]
    assert result.tolist() == [[-1.875, -1.125, -1.875], [-1.125, 0, -1.125], [-1.875, -1.125, -1.875]]
    assert folded_offset(weight).tolist() == [-3.375]


@pytest.mark.parametrize("layer", [nn.Conv1d(6, 4, 3, padding=1), nn.Conv3d(6, 4, 3, padding=1), nn.Linear(6, 4)])
def test_other_dimensions(layer):
    """One- and three-dimensional convolutions and linear layers fold alike."""
    n_spatial = layer.weight.dim() - 2
    x = _hardswish_output(2, 6, *[5] * n_spatial)
    explicit = negatively_padded(layer, x, layer.weight)
    torch.testing.assert_close(with_offset_in_bias(layer)(x + HARDSWISH_OFFSET), explicit, rtol=0, atol=1e-5)


def test_the_offset_is_the_minimum_of_hardswish():
    """No hard swish goes below -3/8, so that the shifted input is never clipped at 0; unsigned codes start there."""
    x = torch.linspace(-4, 4, 8001)
    assert float(F.hardswish(x).min()) == pytest.approx(-HARDSWISH_OFFSET, abs=1e-6)
    quantizer = Shifted(DuQ(2, signed=False))
    quantizer.quantizer.set_range(torch.tensor(3.0))
    assert quantizer(torch.tensor([-0.375, 0.7, 9.0])).tolist() == pytest.approx([-0.375, 0.625, 2.625])


def test_the_layer_itself_stays():
    """Folding copies: the bias of the given layer is what it was."""
    layer = nn.Conv2d(6, 4, 3)
    before = layer.bias.detach().clone()
    with_offset_in_bias(layer)
    assert torch.equal(layer.bias, before)


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect")])
def test_what_cannot_be_folded_is_refused(layer):
    """Transposed convolutions and other paddings have no single constant."""
    with pytest.raises(ModelError, match="signed quantizer"):
        with_offset_in_bias(layer)
