"""Exact CLADO on a digits network of 12 convolutions, entry by entry against a double loop over whole forward passes."""

import numpy as np
import pytest
import torch
from naive_loops import NaiveLoop, cross_entropy, kl_from, with_statistics

from mpq_plugins import Space, find_layers, menu
from mpq_plugins.digits import DigitsNet, digits
from mpq_plugins.proxies import CLADO


def small_digits_net(dtype=torch.float64):
    torch.manual_seed(0)
    net = DigitsNet(width=4)
    net.fc.weight.data.mul_(5)  # so that losses move by more than rounding
    return with_statistics(net, digits(train=True, batch_size=256)[0].inputs).to(dtype)


def batches_of_digits(dtype=torch.float64):
    return [(batch.inputs.to(dtype), batch.labels) for batch in digits(train=False, batch_size=4)[:1]]


def space_of(model, choices):
    """The 12 convolutions of the blocks, shortcuts included; stem and classifier stay at 8 bits."""
    example = torch.zeros(1, 1, 8, 8, dtype=model.fc.weight.dtype)
    return Space.build(find_layers(model, example), choices, pin={"stem": "w8a8", "fc": "w8a8"})


def measured(scores):
    """Single losses [choice] and interactions [choice, choice], as the naive loop orders them."""
    return np.concatenate(scores.loss), scores.pairwise


@pytest.mark.parametrize(
    ("choices", "per_channel", "loss"),
    [
        (menu((2, 8), (8,)), True, "cross_entropy"),
        (menu((2, 8), (8,)), False, "kl"),
        (menu((3,), (4, 8)), True, "kl"),
    ],
    ids=["weights of channels, cross-entropy", "weights of tensors, KL", "with activations, KL"],
)
def test_every_entry_equals_the_double_loop(choices, per_channel, loss):
    """Single losses and all interactions agree with whole forward passes of deep copies to 1e-5 relative."""
    model, batches = small_digits_net(), batches_of_digits()
    space = space_of(model, choices)
    naive = NaiveLoop(model, space, batches, per_channel=per_channel)
    criterion = cross_entropy(batches) if loss == "cross_entropy" else kl_from(naive.logits())
    single, omega = naive.losses(criterion)
    scores = CLADO(tier="exact", correction=False, loss=loss, per_channel=per_channel).score(model, space, batches)
    found_single, found_omega = measured(scores)
    free = [index for index, (unit, _) in enumerate(naive.options) if space.is_free(space.units[unit])]
    assert len(free) == 24
    np.testing.assert_allclose(found_single[free], single[free], rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found_omega, omega, rtol=1e-5, atol=1e-12)
    assert np.count_nonzero(omega) == 24 * 22
    assert scores.facts["layer_evaluations"] < 0.6 * naive.n_forwards * 14 * len(batches[0][1])


def test_float32_agrees_to_rounding():
    """In float32, single losses and some interactions are those of whole passes to a few units in the loss's last place."""
    model, batches = small_digits_net(torch.float32), batches_of_digits(torch.float32)
    space = space_of(model, menu((2, 8), (8,)))
    naive, criterion = NaiveLoop(model, space, batches), cross_entropy(batches)
    single = naive.single_losses(criterion)
    found_single, found_omega = measured(CLADO(tier="exact", correction=False).score(model, space, batches))
    free = [index for index, (unit, _) in enumerate(naive.options) if space.is_free(space.units[unit])]
    np.testing.assert_allclose(found_single[free], single[free], rtol=1e-3, atol=5e-6)
    base = criterion(naive.logits())
    for i, j in [(1, 3), (1, 24), (5, 9), (7, 18), (12, 15)]:
        omega = criterion(naive.logits(naive.options[i], naive.options[j])) - base - single[i] - single[j]
        assert found_omega[i, j] == pytest.approx(omega, rel=1e-3, abs=1e-5)
