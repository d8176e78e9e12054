"""CSMPQ against loops over documents and channels."""

import math

import numpy as np
import pytest
import torch
from papers import PublishedCSMPQ
from papers.csmpq import published_tf_idf
from torch import nn
from torchvision.models.resnet import BasicBlock

from mpq_plugins import Space, find_layers, menu
from mpq_plugins.allocation import as_budgets, solve_scores
from mpq_plugins.errors import DataError
from mpq_plugins.proxies import CSMPQ
from mpq_plugins.proxies.separability import pooled, tf_idf
from mpq_plugins.proxies.utility import losses


def loops(documents, *, corrected, kappa=1.0):
    """The published steps, one channel and one document at a time; `corrected` is the default form of the product."""
    n_channels, n_documents = documents.shape
    total = [sum(documents[c][d] for c in range(n_channels)) for d in range(n_documents)]
    result = 0.0
    for c in range(n_channels):
        mean = sum(documents[c][d] for d in range(n_documents)) / n_documents
        members = [d for d in range(n_documents) if documents[c][d] >= mean]
        frequency = sum(kappa * documents[c][d] / total[d] for d in members if total[d] > 0) / (len(members) + 1e-11)
        smoothing = 1 if corrected else 0
        result += frequency * math.log((n_documents + smoothing) / (len(members) + 1))
    return result if corrected else result / n_channels


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    shortcut = nn.Sequential(nn.Conv2d(6, 9, 1, stride=2), nn.BatchNorm2d(9))
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        BasicBlock(6, 9, 2, shortcut),
        nn.Conv2d(9, 5, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    ).eval()
    inventory = find_layers(model, torch.zeros(1, 3, 10, 8))
    return model, Space.build(inventory, menu(), tie=[("1.conv2", "1.downsample.0")])


def images(n, seed=0):
    return torch.randn(n, 3, 10, 8, generator=torch.Generator().manual_seed(seed))


def stored_documents(model, batch):
    """Rectified means per channel and image [C, N] of the five units, from modules run by hand, in float64."""
    with torch.no_grad():
        stem = model[0](batch)
        block = model[1]
        inner = torch.relu(block.bn1(block.conv1(stem)))
        end = block(stem)
        last = model[2](end)
        features = [stem, inner, end, last, model(batch)]
    flat = [feature.clamp(min=0).double().reshape(len(batch), feature.shape[1], -1) for feature in features]
    return [feature.mean(2).numpy().T for feature in flat]


def test_scores_equal_loops_over_stored_features(setting):
    """Streamed TF-IDF equals the published steps in loops over features stored from the modules, in both forms."""
    batch = images(12)
    documents = stored_documents(setting[0], batch)
    corrected = CSMPQ().score(*setting, [batch]).facts["tf_idf"]
    published = PublishedCSMPQ().score(*setting, [batch]).facts["tf_idf"]
    np.testing.assert_allclose(corrected, [loops(unit, corrected=True) for unit in documents], rtol=1e-5)
    np.testing.assert_allclose(published, [loops(unit, corrected=False) for unit in documents], rtol=1e-5)


def test_several_batches_equal_one(setting):
    """Statistics are over all images, however they are cut into batches; the last batch is cut to `n_images`."""
    batch = images(12)
    whole = CSMPQ(n_images=10).score(*setting, [batch[:10]])
    parts = CSMPQ(n_images=10).score(*setting, [batch[:4], batch[4:7], batch[7:12]])
    np.testing.assert_allclose(parts.facts["tf_idf"], whole.facts["tf_idf"], rtol=1e-5)
    assert parts.facts["n_images"] == 10


def test_classes_are_documents(setting):
    """With labels, documents are the class means of the pooled features, over all batches."""
    batch, labels = images(12), torch.tensor([2, 0, 2, 7, 0, 2, 2, 7, 0, 0, 2, 7])
    documents = stored_documents(setting[0], batch)
    expected = []
    for unit in documents:
        means = [np.mean([unit[:, n] for n in range(12) if labels[n] == label], axis=0) for label in (0, 2, 7)]
        expected.append(loops(np.array(means).T, corrected=True))
    proxy = CSMPQ(documents="classes")
    scores = proxy.score(*setting, [(batch[:5], labels[:5]), (batch[5:], labels[5:])])
    np.testing.assert_allclose(scores.facts["tf_idf"], expected, rtol=1e-5)
    assert scores.facts["n_documents"] == 3
    assert proxy.needs_labels
    assert not CSMPQ().needs_labels


def test_tf_idf_by_hand():
    """Two channels, each alone in one of two documents: TF 1, IDF ln(3/2) each; the published IDF is ln(2/2) = 0."""
    documents = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert tf_idf(documents) == pytest.approx(2 * math.log(1.5))
    assert published_tf_idf(documents) == 0.0
    one_of_four = np.array([[4.0, 0, 0, 0], [4.0, 4, 4, 4]])
    # Channel 0: in document 0 only, share 1/2. Channel 1 is at its mean everywhere: IDF ln(5/5) or ln(4/5).
    assert tf_idf(one_of_four) == pytest.approx(0.5 * math.log(5 / 2))
    expected = (0.5 * math.log(4 / 2) + (0.5 + 3) / 4 * math.log(4 / 5)) / 2
    assert published_tf_idf(one_of_four) == pytest.approx(expected)
    kappa = math.log(math.e * 2 / 4)
    assert published_tf_idf(one_of_four, balance=4) == pytest.approx(kappa * expected)


def test_the_correction_removes_the_number_of_channels():
    """Twice the channels halve the published score and leave the corrected one; dead channels leave it too."""
    documents = np.random.default_rng(0).random((6, 9))
    doubled, padded = np.concatenate([documents, documents]), np.concatenate([documents, np.zeros((4, 9))])
    assert published_tf_idf(doubled) == pytest.approx(published_tf_idf(documents) / 2)
    assert tf_idf(doubled) == pytest.approx(tf_idf(documents))
    assert tf_idf(padded) == pytest.approx(tf_idf(documents))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (3, 4, 5, 7), (3, 4, 2, 3, 5)])
def test_pooling_rectifies_first(shape):
    """The pooled value is the mean over all positions of the positive part, also where height and width differ."""
    feature = torch.randn(shape)
    expected = feature.clamp(min=0).double().reshape(3, 4, -1).mean(2)
    torch.testing.assert_close(pooled(feature, 1 - feature.dim()), expected, atol=1e-6, rtol=1e-6)
    tokens = feature.movedim(1, -1)
    torch.testing.assert_close(pooled(tokens, -1), expected, atol=1e-6, rtol=1e-6)


def test_pooling_in_parts_is_pooling(monkeypatch):
    """Feature maps are pooled a few images at a time with the same result."""
    feature = torch.randn(7, 3, 4, 4)
    whole = pooled(feature, -3)
    monkeypatch.setattr("mpq_plugins.proxies.separability._N_VALUES", 100)
    torch.testing.assert_close(pooled(feature, -3), whole)


@pytest.mark.parametrize("proxy", [CSMPQ(), CSMPQ(documents="classes"), PublishedCSMPQ(), PublishedCSMPQ(mode="ptq")], ids=repr)
@pytest.mark.parametrize("case", ["all-zero images", "dead layer", "one image"])
def test_degenerate_features_give_finite_scores(proxy, case):
    """Empty documents, dead channels, one-channel layers and a single document give numbers."""
    model = nn.Sequential(nn.Conv2d(3, 1, 3, bias=False), nn.ReLU(), nn.Conv2d(1, 4, 3, bias=False)).eval()
    if case == "dead layer":
        with torch.no_grad():
            model[0].weight.zero_()
    space = Space.build(find_layers(model, torch.randn(1, 3, 8, 8)), menu())
    n_images = 1 if case == "one image" and not proxy.needs_labels else 4
    batch = torch.zeros(n_images, 3, 8, 8) if case == "all-zero images" else torch.randn(n_images, 3, 8, 8)
    scores = proxy.score(model, space, [(batch, torch.arange(n_images))])
    assert np.isfinite(scores.facts["theta"]).all()
    if case == "dead layer":
        assert scores.facts["tf_idf"] == [0.0, 0.0]


def test_labels_are_missed_only_where_they_count(setting):
    """Without labels the class form says so; one class, or labels of another shape, are refused too."""
    proxy = CSMPQ(documents="classes")
    with pytest.raises(DataError, match='documents="classes" groups images by their labels, and these batches carry none'):
        proxy.score(*setting, [images(4)])
    with pytest.raises(DataError, match="all 4 images have the label 1"):
        proxy.score(*setting, [(images(4), torch.ones(4))])
    with pytest.raises(DataError, match=r"labels have shape \(4, 2\) for 4 images"):
        proxy.score(*setting, [(images(4), torch.ones(4, 2))])


def test_activations_that_are_not_finite_are_named(setting):
    """NaN in an image is reported at the first layer that sees it."""
    batch = images(4)
    batch[2] = float("nan")
    with pytest.raises(DataError, match="activations of 0 are not finite"):
        CSMPQ().score(*setting, [batch])


def test_published_modes_order_units_in_opposite_ways(setting):
    """QAT takes the score as importance, PTQ takes exp(-beta score)."""
    qat, ptq = (PublishedCSMPQ(mode=mode, beta=2.0).score(*setting, [images(8)]) for mode in ("qat", "ptq"))
    assert qat.facts["theta"] == qat.facts["tf_idf"] == ptq.facts["tf_idf"]
    np.testing.assert_allclose(ptq.facts["theta"], np.exp(-2.0 * np.array(qat.facts["tf_idf"])))
    assert qat.proxy["name"] == "csmpq-published"


def test_negative_importances_keep_their_signs():
    """The published score of balance 200 is negative for all layers, so more bits lose more: all take the fewest."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    inputs = torch.randn(16, 8)
    space = Space.build(find_layers(model, inputs), menu((2, 4, 8), (8,)))
    scores = PublishedCSMPQ(balance=200).score(model, space, [inputs])
    assert max(scores.facts["theta"]) < 0
    assert all(list(row) == sorted(row) for row in scores.loss)
    allocation = solve_scores(scores, as_budgets({"size": "w8"}))
    assert {str(precision) for precision in allocation.bits.layers.values()} == {"w2a8"}


@pytest.mark.parametrize("utility", ["linear", "concave"])
def test_importances_of_both_signs_stay_in_proportion(utility):
    """Importances 1 and -2 are scaled by 2, the larger magnitude: one loss falls with the bits, the other rises."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.ones_(model[0].weight).data[0] = -1
    model[1].weight.data.copy_(model[0].weight.data)
    space = Space.build(find_layers(model, torch.ones(1, 4)), menu((2, 4), (8,)))
    up, down = losses(model, space, [1.0, -2.0], utility)
    assert up[0] > up[1]
    assert [-2 * value for value in up] == pytest.approx(down)


@pytest.mark.parametrize("beta", [1e6, -1e6])
def test_a_score_beyond_what_numbers_hold_is_told(setting, beta):
    """exp(-beta x) of all layers is 0, or infinite for a negative beta: no plan may be called optimal on that."""
    model, space = setting
    with pytest.raises(DataError, match=r"theta = exp\(-beta x\) (under|over)flows.*Take a beta of at most"):
        PublishedCSMPQ(mode="ptq", beta=beta).score(model, space, [images(8)])
