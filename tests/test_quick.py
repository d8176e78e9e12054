"""Batches for quick passes: the same rows, smaller and with channels last where the network takes them so."""

import copy

import pytest
import torch
from torch import nn

from mpq_plugins.adapter.remembered import Remembered
from mpq_plugins.model.quick import quick
from mpq_plugins.model.run import Batch

TAKES = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())


class Views(nn.Module):
    """A network that fails on images with channels last."""

    def forward(self, x):
        return x.view(len(x), -1)


class Mixes(nn.Module):
    """A network that reads memory instead of values."""

    def forward(self, x):
        return x.as_strided((len(x), 4), (x[0].numel(), 1))


@pytest.mark.parametrize(("net", "last"), [(TAKES, True), (Views(), False), (Mixes(), False), (nn.Identity(), True)])
def test_large_images_pass_a_few_at_a_time(net, last):
    """Rows keep their order and values, no batch gets longer than asked; channels go last only where outputs stay."""
    images = torch.randn(20, 3, 224, 224)
    parts = quick(net, [Batch(part) for part in images.split([7, 7, 6])], longest=7)
    assert torch.equal(torch.cat([part.inputs for part in parts]), images)
    assert [len(part) for part in parts] == [7, 7, 6]
    assert all(part.inputs.is_contiguous(memory_format=torch.channels_last) == last for part in parts)
    assert [len(part) for part in quick(net, [Batch(images)], longest=20)] == [8, 8, 4]
    single = quick(net, [Batch(image) for image in images.split(1)], longest=2)
    assert [len(part) for part in single] == [2] * 10
    assert torch.equal(torch.cat([part.inputs for part in single]), images)


def test_little_data_stays_as_it_is():
    """Small inputs keep their batches and their memory order."""
    batches = [Batch(torch.randn(8, 3, 8, 8)), Batch({"tokens": torch.ones(4, 6, dtype=torch.long)})]
    assert quick(TAKES, batches, longest=8) == batches


def test_a_weight_is_quantized_again_when_it_changes():
    """Once for equal weights and parameters, views of them too; anew after a change in place of either."""
    quantizer, weight, calls = nn.Linear(1, 1), torch.randn(3), []

    def quantize(value):
        calls.append(value.clone())
        return value * quantizer.weight.item()

    remembered = Remembered(quantize, quantizer)
    with torch.no_grad():
        for change in (lambda: None, lambda: weight.mul_(2), lambda: quantizer.weight.add_(1)):
            change()
            for value in (weight, weight[:]):
                assert torch.equal(remembered(value), value * quantizer.weight.item())
        other = copy.deepcopy(weight)
        assert torch.equal(remembered(other), other * quantizer.weight.item())
    assert len(calls) == 4


class Fixed(nn.Module):
    """A network with the number of its batch written into it."""

    def forward(self, x):
        return x.mean((2, 3)).view(8, 3)


def test_a_network_of_one_batch_size_gets_its_own():
    """Batches stay whole where two rows fail."""
    batches = [Batch(torch.randn(8, 3, 256, 256))]
    assert quick(Fixed(), batches, longest=8) == batches
