"""The controls, by hand and against the published allocations."""

import math

import numpy as np
import pytest
import torch
from papers import PublishedSize
from torch import nn

from mpq_plugins import Precision, Space, find_layers, menu, residual_ties
from mpq_plugins.proxies import Constant, Projection, Random, Uniform
from mpq_plugins.proxies.utility import losses


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 2))


def space_of(model, choices, **options):
    return Space.build(find_layers(model, torch.zeros(1, 3, 8, 8)), choices, **options)


def test_uniform_ties_what_is_free():
    """One unit of all free layers with loss minus the bits; pins stay."""
    model = net()
    scores = Uniform().score(model, space_of(model, menu((2, 4, 8)), pin={"4": "w8a8"}))
    assert [unit.layers for unit in scores.space.units] == [("0", "2"), ("4",)]
    assert scores.loss == ((-2.0, -4.0, -8.0), (-8.0,))


def test_projection_counts_squared_bits_from_the_top():
    """Weight bits alone, or weight and activation bits when these are searched."""
    model = net()
    weights = Projection().score(model, space_of(model, menu((2, 4, 5))))
    assert weights.loss[0] == (9.0, 1.0, 0.0)
    both = Projection().score(model, space_of(model, menu((2, 4), (4, 8))))
    assert both.loss[0] == (4 + 16.0, 4.0, 16.0, 0.0)


def test_random_depends_on_the_seed_only():
    """The global generator is neither read nor moved, and seeds differ."""
    model = net()
    space = space_of(model, menu())
    torch.manual_seed(1)
    first = Random(seed=5).score(model, space)
    torch.manual_seed(2)
    assert Random(seed=5).score(model, space).facts == first.facts
    assert Random(seed=6).score(model, space).facts != first.facts
    assert all(0 < theta <= 1 for theta in first.facts["theta"])


def test_concave_losses_are_the_noise_of_the_weights():
    """theta P s^2 (4^-w + 4^-a) over all layers of a unit, relative to the largest free unit, by hand."""
    model = net()
    space = space_of(model, menu((2, 3)), tie=[("0", "2")], pin={"4": "w8a8"})
    first, second, third = (model[index].weight.detach().double().numpy() for index in (0, 2, 4))
    tied = first.size * first.var() + second.size * second.var()
    found = losses(model, space, [3.0, 1.5], "concave")
    noise = [4.0**-2 + 4.0**-8, 4.0**-3 + 4.0**-8]
    np.testing.assert_allclose(found[0], noise)  # The only free unit has importance and noise 1.
    pinned = 0.5 * third.size * third.var() / tied
    np.testing.assert_allclose(found[1], [pinned * 2 * 4.0**-8])


def test_concave_losses_are_the_error_of_a_uniform_quantizer():
    """One more bit divides the squared rounding error by about 4, which is what the concave utility assumes."""
    weight = torch.randn(20000, generator=torch.Generator().manual_seed(0)).double()
    errors = [float((torch.round(weight / step) * step - weight).square().sum()) for step in (0.2, 0.1, 0.05)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.05)


def test_linear_losses_are_minus_importance_times_bits():
    """Activation bits count only where they are searched."""
    model = net()
    assert losses(model, space_of(model, menu((2, 8))), [1.0, 2.0, 4.0], "linear")[1] == (-1.0, -4.0)
    both = losses(model, space_of(model, menu((2, 8), (4, 8))), [1.0, 2.0, 4.0], "linear")
    assert both[2] == (-6.0, -10.0, -12.0, -16.0)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.third = nn.Linear(4, 4)
        self.third.weight.data.copy_(self.first.weight.data)

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def test_a_weight_that_is_shared_counts_once():
    """Two layers on one weight carry the noise of one: it is stored and rounded once."""
    model = Shared()
    space = Space.build(find_layers(model, torch.zeros(1, 4)), menu())
    shared, single = Constant().score(model, space).loss
    assert shared == single


def test_weights_without_values_are_refused_or_harmless():
    """All-zero weights lose nothing; weights that are not finite are named."""
    model = net()
    space = space_of(model, menu())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert set(Constant().score(model, space).loss[0]) == {0.0}
    with torch.no_grad():
        model[2].weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="the weight of 2 holds 1 values that are not finite, of 288"):
        Constant().score(model, space)


PUBLISHED = {4.0: "4 4 4 4 4 4 4 3 3 3 3 3 4 3 2 3 3 3", 4.5: "4 3 3 4 4 4 4 4 4 4 3 3 4 4 3 3 3 3"}


@pytest.fixture(scope="module")
def resnet18():
    from torchvision.models import resnet18

    with torch.device("meta"):
        shapes = resnet18()
    model = shapes.to_empty(device="cpu").eval()
    inventory = find_layers(model, torch.zeros(1, 3, 32, 32))
    return model, Space.build(inventory, menu(range(2, 5)), tie=residual_ties(inventory))


def sizes_at_one_bit(space):
    """Bytes per bit of width of every unit, in the papers' convention."""
    cost = PublishedSize()
    return np.array([sum(cost.of(space.layer(name), Precision(2, 8)) for name in unit.layers) / 2 for unit in space.units])


def projected(sizes, limit):
    """Bits closest to 4 everywhere within the limit, not yet rounded: clip(4 - lambda size, 2, 4), lambda by bisection."""
    low, high = 0.0, 2 / sizes.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(4 - middle * sizes, 2, 4) @ sizes > limit else (low, middle)
    return np.clip(4 - high * sizes, 2, 4)


def filled(bits, sizes):
    """The published rounding: of all ways to round up or down within the size, the fullest; first, later units up."""
    floor, ceiling = np.floor(bits), np.ceil(bits)
    ups = (np.arange(2 ** len(bits))[:, None] >> np.arange(len(bits))) & 1  # [way, unit]; later units are higher digits
    totals = floor @ sizes + ups @ ((ceiling - floor) * sizes)
    fits = totals <= bits @ sizes * (1 + 1e-12)
    fullest = np.flatnonzero(fits & (totals >= totals[fits].max() - 1e-6))
    return (floor + ups[fullest[-1]] * (ceiling - floor)).astype(int)


@pytest.mark.parametrize("mib", PUBLISHED)
def test_published_lists_need_no_score(resnet18, mib):
    """OMPQ's published PTQ lists of ResNet-18 are the projection of "4 bits everywhere", rounded as its code rounds."""
    _, space = resnet18
    sizes = sizes_at_one_bit(space)
    assert " ".join(map(str, filled(projected(sizes, mib * 2**20), sizes))) == PUBLISHED[mib]


@pytest.mark.parametrize("mib", PUBLISHED)
def test_the_exact_projection_is_closer_than_the_published_rounding(resnet18, mib):
    """The 0/1 optimum of `Projection` differs from the published list by rounding alone: within budget and closer to 4."""
    from mpq_plugins import Budget, build_problem, solve

    model, space = resnet18
    scores = Projection().score(model, space)
    problem = build_problem(scores, [Budget(PublishedSize(), mib * 2**20)])
    solution = solve(problem)
    published = [int(bits) - 2 for bits in PUBLISHED[mib].split()]
    assert problem.is_feasible(published)
    assert solution.gap <= 1e-9
    assert (problem.objective(published), solution.objective) == {4.0: (13, 10), 4.5: (8, 5)}[mib]
    assert problem.is_feasible(solution.choice)
    assert solution.objective < problem.objective(published)
