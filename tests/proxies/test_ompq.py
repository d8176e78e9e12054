"""OMPQ against independent forms: explicit feature matrices, double loops, the published procedure."""

import logging
import re

import numpy as np
import pytest
import torch
from papers import PublishedOMPQ
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from mpq_plugins import Space, find_layers, menu, residual_ties
from mpq_plugins.errors import DataError, ModelError
from mpq_plugins.proxies import OMPQ
from mpq_plugins.proxies.ompq import importance, suffix_means
from mpq_plugins.proxies.orthogonality import centred, gram, u_centred


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10).eval()
    inventory = find_layers(model, torch.zeros(1, 3, 32, 32))
    return model, Space.build(inventory, menu(range(2, 5)), tie=residual_ties(inventory))


def images(n, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def stored_features(model, batch):
    """Feature matrices [N, p] of the ten units of the small ResNet, by plain hooks, in float64."""
    relus, ends = [], []
    handles = [model.fc.register_forward_hook(lambda _m, _i, out: ends.append(out.clone()))]
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            handles.append(module.register_forward_hook(lambda _m, _i, out: relus.append(out.clone())))
        if isinstance(module, BasicBlock):
            handles.append(module.register_forward_hook(lambda _m, _i, out: ends.append(out.clone())))
    with torch.no_grad():
        model(batch)
    for handle in handles:
        handle.remove()
    stem, inner = relus[0], relus[1::2]
    ordered = [stem, *(feature for pair in zip(inner, ends[:-1], strict=True) for feature in pair), ends[-1]]
    return [feature.flatten(1).double().numpy() for feature in ordered]


def published_orm(first, second):
    """||Xj' Xi||_F^2 / (||Xi' Xi||_F ||Xj' Xj||_F) on column-centred features, equation (5) of arXiv 2109.07865."""
    first, second = first - first.mean(0), second - second.mean(0)
    cross = np.linalg.norm(second.T @ first) ** 2
    return cross / (np.linalg.norm(first.T @ first) * np.linalg.norm(second.T @ second))


def hsic_by_loops(k, el):
    """The unbiased HSIC of Song et al. (2012), equation (5), as loops over pairs of different images of two Gram matrices."""
    n = len(k)
    product = sum(k[a, b] * el[a, b] for a in range(n) for b in range(n) if a != b)
    rows_k = [sum(k[a, b] for b in range(n) if b != a) for a in range(n)]
    rows_el = [sum(el[a, b] for b in range(n) if b != a) for a in range(n)]
    mixed = sum(x * y for x, y in zip(rows_k, rows_el, strict=True))
    return (product + sum(rows_k) * sum(rows_el) / ((n - 1) * (n - 2)) - 2 / (n - 2) * mixed) / (n * (n - 3))


def by_pairs(features, hsic):
    """A similarity of Gram matrices over all pairs of units."""
    grams = [feature @ feature.T for feature in features]
    return np.array([[hsic(first, second) for second in grams] for first in grams])


def cosines(table):
    return table / np.sqrt(np.outer(np.diag(table), np.diag(table)))


def orm_of(proxy, setting, batches):
    return np.array(proxy.score(*setting, batches).facts["orm"])


def test_the_biased_form_is_the_published_procedure(resnet):
    """Streamed Gram matrices give the published ratio of feature products, on stored features of plain hooks, to 1e-6."""
    batch = images(12)
    features = stored_features(resnet[0], batch)
    # Products of p x p matrices are only feasible for some of the units.
    small = [index for index, feature in enumerate(features) if feature.shape[1] <= 1024]
    assert len(small) == 5
    found = orm_of(PublishedOMPQ(), resnet, [batch])
    for i in small:
        for j in small:
            assert found[i, j] == pytest.approx(published_orm(features[i], features[j]), abs=1e-6)


@pytest.mark.parametrize("estimator", ["biased", "debiased"])
def test_all_pairs_equal_an_independent_implementation(resnet, estimator):
    """Both estimators equal loops over images (debiased) or traces of centred Gram matrices (biased), to 1e-6."""
    batch = images(10)
    features = stored_features(resnet[0], batch)
    centre = np.eye(10) - 1 / 10

    def biased(first, second):
        return np.trace(first @ centre @ second @ centre)

    expected = cosines(by_pairs(features, biased if estimator == "biased" else hsic_by_loops))
    found = orm_of(OMPQ(estimator=estimator), resnet, [batch])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert (np.diag(found) == 1.0).all()


def test_batches_average_the_unbiased_hsic(resnet):
    """Over several batches the debiased ORM is the ratio of HSICs averaged over batches by their images."""
    batches = [images(8, seed=1), images(8, seed=2), images(4, seed=3)]
    table = sum(len(batch) * by_pairs(stored_features(resnet[0], batch), hsic_by_loops) for batch in batches)
    expected = cosines(table)
    np.testing.assert_allclose(orm_of(OMPQ(), resnet, batches), expected, atol=1e-6)


def test_only_the_first_images_count_and_no_batch_is_drawn_in_vain(resnet):
    """`n_images` cuts the last batch, and the loader is not asked for more."""
    drawn = []

    def loader():
        for seed in range(5):
            drawn.append(seed)
            yield images(8, seed), torch.zeros(8, dtype=torch.long)

    scores = OMPQ(n_images=12).score(*resnet, loader())
    assert drawn == [0, 1]
    assert scores.facts["n_images"] == 12
    assert scores.loss == OMPQ(n_images=12).score(*resnet, [images(8, 0), images(8, 1)[:4]]).loss


def test_centring_equals_the_definition():
    """Centred Gram matrices equal those of centred features; U-centred ones have rows that sum to zero."""
    features = torch.randn(7, 20, dtype=torch.float64)
    kernel = features @ features.T
    away = features - features.mean(0)
    torch.testing.assert_close(centred(kernel), away @ away.T)
    adjusted = u_centred(kernel)
    assert adjusted.sum(dim=1).abs().max() < 1e-12
    assert adjusted.diagonal().abs().max() == 0


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "half"])
def test_gram_is_the_same_in_any_layout(layout):
    """Memory layout does not matter, half precision is widened first, and long features are summed in parts."""
    feature = torch.randn(6, 8, 120, 121).round(decimals=1)
    given = {
        "contiguous": feature,
        "channels_last": feature.contiguous(memory_format=torch.channels_last),
        "strided": feature.transpose(2, 3),
        "half": feature.half(),
    }[layout]
    exact = given.double().flatten(1)
    torch.testing.assert_close(gram(given), exact @ exact.T, rtol=1e-5, atol=1e-2)


def test_independent_features_look_dependent_only_to_the_biased_form():
    """For Gaussian features of length p the biased CKA of N images is about p / (p + N), the debiased one near 0."""
    generator = torch.Generator().manual_seed(0)
    kernels = torch.stack([gram(torch.randn(32, 5000, generator=generator)) for _ in range(2)])

    def cosine(pair):
        return float((pair[0] * pair[1]).sum() / pair[0].norm() / pair[1].norm())

    assert abs(cosine(centred(kernels)) - 5000 / 5032) < 2e-3
    assert abs(cosine(u_centred(kernels))) < 0.15


def chain(*modules):
    model = nn.Sequential(*modules).eval()
    inventory = find_layers(model, torch.randn(1, 3, 8, 8))
    return model, Space.build(inventory, menu())


@pytest.mark.parametrize("estimator", ["biased", "debiased"])
def test_constant_features_depend_on_everything(estimator):
    """A unit whose output is the same for all images has ORM 1 with all units: never important, never NaN."""
    model, space = chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.fill_(1.5)
    scores = OMPQ(estimator=estimator).score(model, space, [torch.randn(8, 3, 8, 8)])
    orm = np.array(scores.facts["orm"])
    assert orm[1].tolist() == [1.0, 1.0, 1.0]  # And so is the classifier behind it.
    assert scores.facts["theta"][0] == scores.facts["theta"][1]


@pytest.mark.parametrize("proxy", [OMPQ(), PublishedOMPQ()], ids=repr)
@pytest.mark.parametrize("case", ["all-zero images", "dead channels", "one channel", "one layer"])
def test_degenerate_features_give_finite_scores(proxy, case):
    """Nothing varies, nothing is alive, or there is nobody to compare with: the scores are finite all the same."""
    layers = [nn.Conv2d(3, 1, 3), nn.ReLU()] if case == "one layer" else [nn.Conv2d(3, 1, 3), nn.ReLU(), nn.Conv2d(1, 4, 3)]
    model, space = chain(*layers)
    if case == "dead channels":
        with torch.no_grad():
            model[0].bias.fill_(-1e6)
    batch = torch.zeros(6, 3, 8, 8) if case == "all-zero images" else torch.randn(6, 3, 8, 8)
    scores = proxy.score(model, space, [batch])
    assert np.isfinite(scores.facts["orm"]).all()
    assert (np.diag(scores.facts["orm"]) == 1.0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(bad):
    """The error names the first layer with such values, how many, and where to look."""
    model, space = chain(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    batch = torch.randn(4, 3, 8, 8)
    batch[1, 0, 4, 4] = bad
    with pytest.raises(DataError, match=r"activations of 0 are not finite: \d+ NaN and \d+ infinite of 576 values.*Look for"):
        OMPQ().score(model, space, [batch])
    assert torch.is_grad_enabled()


def test_activations_too_large_for_their_squares_are_told_apart():
    """Finite activations whose inner products overflow get an error of their own."""
    model, space = chain(nn.Conv2d(3, 4, 3))
    with pytest.raises(DataError, match="too large for statistics in float32"):
        OMPQ().score(model, space, [torch.full((4, 3, 120, 120), 1e25)])


def test_missing_small_and_wrong_batches_are_refused(caplog):
    """No batches, batches too small for the estimate and batches of the wrong shape state the fact and the next step."""
    model, space = chain(nn.Conv2d(3, 4, 3))
    with pytest.raises(DataError, match="no batches were given"):
        OMPQ().score(model, space)
    with pytest.raises(DataError, match="at least 4 images"):
        OMPQ().score(model, space, [torch.randn(3, 3, 8, 8)] * 2)
    with pytest.raises(DataError, match="forward pass of Sequential failed on a batch"):
        OMPQ().score(model, space, [torch.randn(4, 5, 8, 8)])
    with caplog.at_level(logging.WARNING):
        OMPQ(n_images=16).score(model, space, [torch.randn(4, 3, 8, 8)])
    assert "asked for 16 images and was given 4" in caplog.text


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 3)

    def forward(self, x):
        return self.small(x) if x.shape[-1] == 8 else self.large(x)


def test_a_layer_that_never_runs_is_named():
    """Batches that take another path through the model than the example are refused."""
    model = Branching()
    space = Space.build(find_layers(model, torch.randn(1, 3, 8, 8)), menu())
    with pytest.raises(ModelError, match="small did not run"):
        OMPQ().score(model, space, [torch.randn(4, 3, 12, 12)])


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.project, self.head = nn.Linear(6, 5), nn.Linear(20, 2)

    def forward(self, x):
        windows = self.project(x.reshape(len(x) * 4, 6))
        return self.head(windows.reshape(len(x), 20))


def test_windows_are_put_back_together():
    """Feature maps of windows stacked image by image equal the feature map of the whole image."""
    model = Windows()
    space = Space.build(find_layers(model, torch.randn(1, 24)), menu())
    batch = torch.randn(6, 24)
    found = orm_of(OMPQ(estimator="biased"), (model, space), [batch])
    with torch.no_grad():
        features = [model.project(batch.reshape(24, 6)).reshape(6, 20), model(batch)]
    expected = published_orm(*(feature.double().numpy() for feature in features))
    assert found[0, 1] == pytest.approx(expected, abs=1e-6)


def test_importance_by_hand():
    """exp(-beta gamma), standardised or not, with pinned units outside of the standardisation."""
    gamma, free = np.array([1.0, 3.0, 0.0]), np.array([1.0, 1.0, 0.0])
    np.testing.assert_allclose(importance(gamma, free, beta=2.0, exponent="raw"), np.exp([-2.0, -6.0, 0.0]))
    # Free gammas 1 and 3: least 1, deviation 1. The pinned unit stays at 1 or below.
    np.testing.assert_allclose(importance(gamma, free, beta=0.5, exponent="standardised"), [1.0, np.exp(-1.0), 1.0])
    same = importance(np.full(3, 7.0), np.ones(3), beta=100.0, exponent="standardised")
    assert same.tolist() == [1.0, 1.0, 1.0]


def test_suffix_means_by_hand():
    """The published coefficient is the mean of theta over this and all later units, pinned ones left out."""
    assert suffix_means(np.array([1.0, 2.0, 6.0]), np.ones(3)).tolist() == [3.0, 4.0, 6.0]
    assert suffix_means(np.array([9.0, 2.0, 6.0, 5.0]), np.array([0.0, 1.0, 1.0, 0.0])).tolist() == [4.0, 4.0, 6.0, 5.0]


def test_the_published_loss_is_minus_coefficient_times_bits(resnet):
    """Losses of the published form are proportional to suffix means of exp(-gamma), times the bits."""
    scores = PublishedOMPQ(n_images=8).score(*resnet, [images(8)])
    gamma = np.array(scores.facts["orm"]).sum(1) - 1
    theta = np.exp(-gamma)
    coefficient = np.array([theta[i:].mean() for i in range(len(theta))])
    expected = -np.outer(coefficient / coefficient.max(), [2, 3, 4])
    np.testing.assert_allclose(scores.loss, expected, rtol=1e-12)
    assert scores.proxy == {"name": "ompq-published", "beta": 1.0, "n_images": 8}


def test_underflow_of_the_published_importance_is_told(resnet):
    """exp(-beta gamma) of every layer is 0 at beta 1e5: an error with a beta that works, which then does."""
    model, space = resnet
    batches = [images(8)]
    with pytest.raises(DataError, match=r"underflows to 0 for every free layer: beta is 100000.* of at most (\S+) in") as error:
        PublishedOMPQ(beta=1e5).score(model, space, batches)
    works = float(re.search(r"of at most (\S+) in", str(error.value)).group(1))
    assert max(PublishedOMPQ(beta=works).score(model, space, batches).facts["theta"]) > 0
    assert min(OMPQ(beta=1e5).score(model, space, batches).facts["theta"]) >= 0
