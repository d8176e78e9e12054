"""Data, weights and spaces at the edge: clear results, or errors that say what to do."""

import numpy as np
import pytest
import torch
from torch import nn

from mpq_plugins import Precision, Space, find_layers, menu
from mpq_plugins.errors import DataError, ModelError
from mpq_plugins.proxies import CLADO
from mpq_plugins.space.space import Unit

every_tier = pytest.mark.parametrize("tier", ["fisher", "gram", "exact"])


def made(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    return model, Space.build(find_layers(model, torch.zeros(1, 6)), menu((2, 4), (8,)), **options)


def data(n=8):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 4


def finite(scores):
    pairwise = np.zeros(1) if scores.pairwise is None else scores.pairwise
    return bool(np.isfinite(np.concatenate(scores.loss)).all() and np.isfinite(pairwise).all())


@every_tier
def test_logits_that_are_not_finite(tier):
    """NaN in the images, or in the weights, is told apart from a failing choice."""
    model, space = made()
    images, labels = data()
    bad = images.clone()
    bad[3, 2] = torch.nan
    with pytest.raises(DataError, match="output of the float model is not finite: 4 of 32"):
        CLADO(tier=tier).score(model, space, [(bad, labels)])
    model[2].weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match="the weight of 2 holds 1 values that are not finite"):
        CLADO(tier=tier).score(model, space, [(images, labels)])


class Exploding(nn.Module):
    """Finite with its own weights only: without them it divides zero by zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 4)
        self.a.weight.data = torch.tensor([[1.0] * 6, [0.01] * 6])

    def forward(self, x):
        y = self.a(x.abs())
        return self.b(y / y[:, 1:])


@pytest.mark.parametrize("tier", ["gram", "exact"])
def test_one_choice_that_is_not_finite(tier):
    """The unit and the precision are named, also where the model runs plainly."""
    torch.manual_seed(0)
    model = Exploding()
    space = Space.build(find_layers(model, torch.ones(1, 6)), menu((2, 8), (8,)))
    with pytest.raises(DataError, match="not finite with a at w2a8"):
        CLADO(tier=tier, per_channel=False).score(model, space, [data()])


@every_tier
def test_data_of_one_class(tier):
    """One class is data like any other."""
    model, space = made()
    images, _ = data()
    scores = CLADO(tier=tier).score(model, space, [(images, torch.full((8,), 2))])
    assert finite(scores)
    assert np.concatenate(scores.loss).any()


@every_tier
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_weights_without_variance(tier, value):
    """All-zero weights are not changed by any choice, and cost nothing; equal weights have finite scores."""
    model, space = made()
    model[2].weight.data.fill_(value)
    scores = CLADO(tier=tier).score(model, space, [data()])
    assert finite(scores)
    if value == 0:
        assert scores.loss[1] == (0.0, 0.0)
        assert not scores.pairwise[2:4].any()


@every_tier
def test_a_model_whose_output_never_changes(tier):
    """With a zero last layer nothing before it matters."""
    model, space = made()
    nn.init.zeros_(model[4].weight)
    scores = CLADO(tier=tier).score(model, space, [data()])
    assert not np.concatenate(scores.loss).any()
    assert not scores.pairwise.any()


@every_tier
def test_a_choice_given_twice(tier):
    """Two choices of one precision have the same loss and the same interactions."""
    model, space = made()
    twice = (Precision(2, 8), Precision(4, 8), Precision(2, 8))
    units = tuple(Unit(unit.layers, twice, unit.activation_group) for unit in space.units)
    space = Space(space.layers, units, space.fingerprint)
    scores = CLADO(tier=tier).score(model, space, [data()])
    for losses in scores.loss:
        assert losses[0] == pytest.approx(losses[2], rel=1e-3, abs=1e-7)
    between = scores.pairwise[:3, 3:6]
    np.testing.assert_allclose(between[0], between[2], rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(between[:, 0], between[:, 2], rtol=1e-3, atol=1e-6)


@every_tier
def test_one_layer(tier):
    """A model that is one layer has scores, and no interactions between units."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    space = Space.build(find_layers(model, torch.zeros(1, 6)), menu((2, 8), (8,)))
    scores = CLADO(tier=tier).score(model, space, [data()])
    assert len(scores.loss) == 1
    assert finite(scores)
    if tier == "exact":
        assert not scores.pairwise.any()


@every_tier
def test_nothing_left_to_decide(tier):
    """With every layer pinned all scores are zero, and the base is the pinned model."""
    model, space = made(pin={"*": "w2a8"})
    scores = CLADO(tier=tier).score(model, space, [data()])
    assert scores.loss == ((0.0,), (0.0,), (0.0,))
    assert not np.any(scores.pairwise)


@every_tier
@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (torch.arange(8), "labels run from 0 to 7, but the output has 4 classes"),
        (torch.arange(8) % 4 - 1, "labels run from -1 to 2"),
        (torch.rand(8), "not class indices"),
        (torch.zeros(8, 3, dtype=torch.long), "do not fit an output of shape"),
        (torch.zeros(7, dtype=torch.long), "do not fit an output of shape"),
    ],
    ids=["too large", "negative", "float", "of positions", "too few"],
)
def test_labels_that_do_not_fit(tier, labels, words):
    """The error says which labels came and what the output holds."""
    model, space = made()
    with pytest.raises(DataError, match=words):
        CLADO(tier=tier).score(model, space, [(data()[0], labels)])


@every_tier
def test_no_data(tier):
    """No batch, batches without images, and zero images wanted are all told before anything runs."""
    model, space = made()
    for batches in ([], [(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))]):
        with pytest.raises(DataError, match="no batches were given"):
            CLADO(tier=tier).score(model, space, batches)
    with pytest.raises(DataError, match="at least one image"):
        CLADO(tier=tier, n_images=0).score(model, space, [data()])
    with pytest.raises(DataError, match="needs labels"):
        CLADO(tier=tier, loss="cross_entropy").score(model, space, [data()[0]])


@every_tier
def test_images_of_another_size_later_on(tier):
    """A later batch that the model cannot take is told with the reason."""
    model, space = made()
    with pytest.raises(DataError, match="failed on a batch"):
        CLADO(tier=tier).score(model, space, [data(), (torch.zeros(8, 5), data()[1])])
