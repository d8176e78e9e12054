"""DuQ against autograd of its formula."""

import pytest
import torch
import torch.nn.functional as F

from mpq_plugins.errors import PrecisionError
from mpq_plugins.training import DuQ, duq


def _written_out(x, a, c, bits, signed):
    """The formula as published, with a round whose gradient is 1."""
    q = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    inner = q * (F.hardtanh(x / a) if signed else F.hardtanh(torch.relu(x) / a, 0, 1))
    return c * (inner + (torch.round(inner) - inner).detach()) / q


def _leaves(*values):
    return [value.clone().requires_grad_() for value in values]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_values_and_gradients_are_those_of_autograd(bits, signed):
    """Output and the gradients by x, a and c equal autograd of the written formula, ends of the clip and 0 included."""
    generator = torch.Generator().manual_seed(bits)
    x = torch.cat([torch.randn(500, generator=generator, dtype=torch.float64), torch.tensor([0.0, 0.75, -0.75, 3.0, -3.0])])
    start = (x, torch.tensor(0.75, dtype=torch.float64), torch.tensor(1.3, dtype=torch.float64))
    upstream = torch.randn(len(x), generator=generator, dtype=torch.float64)
    ours, theirs = _leaves(*start), _leaves(*start)
    mine, written = duq(*ours, bits=bits, signed=signed), _written_out(*theirs, bits, signed)
    mine.backward(upstream)
    written.backward(upstream)
    torch.testing.assert_close(mine, written, rtol=0, atol=0)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_gradient_by_the_clip_is_the_stated_one():
    """d/da is -c x / a^2 inside the clip and 0 outside, whatever the rounding gives."""
    a, c = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0)
    for x, expected in ((1.0, -3 * 1 / 4), (-1.5, 3 * 1.5 / 4), (2.5, 0.0), (-2.5, 0.0)):
        (gradient,) = torch.autograd.grad(duq(torch.tensor([x]), a, c, bits=3, signed=True).sum(), a)
        assert float(gradient) == pytest.approx(expected)


def test_a_hand_worked_quantization():
    """Three bits have the codes -3..3 signed and 0..7 unsigned; rounding is half to even, clipping at a, output up to c."""
    x = torch.tensor([-9.0, -1.0, 0.4, 1.0, 2.0, 9.0])  # x / a * 3 = ..., -1.5, 0.6, 1.5, 3, ...
    a, c = torch.tensor(2.0), torch.tensor(6.0)
    assert duq(x, a, c, bits=3, signed=True).tolist() == [-6, -4, 2, 4, 6, 6]
    # x / a * 7 = 1.4, 3.5, 7
    assert duq(x, a, c, bits=3, signed=False).tolist() == pytest.approx([0, 0, 6 / 7, 24 / 7, 6, 6])


def test_learned_ranges_and_their_start():
    """Both ranges are softplus of parameters, and start at 0.9 max |w| or at the 95th percentile."""
    quantizer = DuQ(4, signed=True)
    quantizer.calibrate_weight(torch.tensor([0.3, -0.02, -2.0]))
    assert quantizer.a.item() == pytest.approx(1.8)
    assert quantizer.c.item() == pytest.approx(1.8)
    assert F.softplus(quantizer.alpha).item() == quantizer.a.item()
    unsigned = DuQ(4, signed=False)
    unsigned.calibrate_activation(torch.cat([torch.arange(1.0, 41.0), -torch.full((60,), 99.0)]))
    assert unsigned.a.item() == pytest.approx(38.0)  # the 38th of the 40 values that relu leaves
    unsigned.calibrate_activation(torch.full((8,), -1.0))
    assert unsigned.a.item() == pytest.approx(1.0)
    quantizer(torch.randn(8)).sum().backward()
    assert quantizer.alpha.grad is not None
    assert quantizer.gamma.grad is not None


@pytest.mark.parametrize("value", [1e-6, 0.05, 1.0, 40.0])
def test_small_and_large_ranges_survive_the_softplus(value):
    """A range is what it was set to, from a millionth to forty."""
    quantizer = DuQ(8, signed=True)
    quantizer.set_range(torch.tensor(value))
    assert quantizer.a.item() == pytest.approx(value, rel=1e-3)


def test_one_bit_is_refused():
    """One signed bit would quantize everything to 0."""
    with pytest.raises(PrecisionError, match="at least 2 bits"):
        DuQ(1, signed=True)
