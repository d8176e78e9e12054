"""Labels as data sets give them: numbers in any container count, names and the like are told."""

import numpy as np
import pytest
import torch
from torch import nn

from mpq_plugins import Batch, Space, find_layers, menu
from mpq_plugins.adapter.evaluate import accuracy
from mpq_plugins.errors import DataError, FewImagesWarning
from mpq_plugins.model.run import labels_of
from mpq_plugins.proxies import CLADO, CSMPQ, Fisher, HessianTrace, KLDivergence, LossIncrease, OutputError
from mpq_plugins.training.loss import Classification

IMAGES = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, 1, 2])
SAME = {
    "tensor": LABELS,
    "list": [0, 2, 1, 2],
    "tuple": (0, 2, 1, 2),
    "numpy": np.array([0, 2, 1, 2], dtype=np.int32),
    "numpy numbers": list(np.array([0, 2, 1, 2])),
    "tensors": list(LABELS),
}
OTHER = {
    "names": ["cat", "dog", "cow", "dog"],
    "one": 3,
    "dicts": [{"boxes": 1}] * 4,
    "ragged": [[0], [1, 2], [3], [4]],
    "name": "cat",
    "strings": np.array(["cat", "dog", "cow", "dog"]),
}


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def space(net):
    return Space.build(find_layers(net, IMAGES), menu((2, 8)))


@pytest.mark.parametrize("labels", SAME.values(), ids=SAME)
def test_numbers_in_any_container_are_labels(net, space, labels):
    """Scores, accuracy and loss are those of a tensor."""
    batch = Batch.of((IMAGES, labels))
    assert torch.equal(labels_of(batch), LABELS)
    assert torch.equal(batch.part(1, 3).labels, LABELS[1:3])
    assert (
        LossIncrease().score(net, space, [(IMAGES, labels)]).loss == LossIncrease().score(net, space, [(IMAGES, LABELS)]).loss
    )
    assert accuracy(net, [(IMAGES, labels)]) == accuracy(net, [(IMAGES, LABELS)])
    assert torch.equal(Classification()(net(IMAGES), batch), nn.functional.cross_entropy(net(IMAGES), LABELS))


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2)])
def test_one_number_is_the_label_of_one_image(net, label):
    """As a data set's own items have it."""
    assert labels_of(Batch(IMAGES[:1], label)).reshape(-1).tolist() == [2]


@pytest.mark.parametrize("labels", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("proxy", [CLADO(), LossIncrease(), Fisher(), HessianTrace(n_probes=1), CSMPQ(documents="classes")])
def test_other_labels_are_refused_where_they_are_read(net, space, labels, proxy):
    """By every score that reads them, by accuracy and by training."""
    for use in (
        lambda: proxy.score(net, space, [(IMAGES, labels)]),
        lambda: accuracy(net, [(IMAGES, labels)]),
        lambda: Classification()(net(IMAGES), Batch(IMAGES, labels)),
    ):
        with pytest.raises(DataError, match="no class indices"):
            use()


@pytest.mark.parametrize("labels", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("proxy", [KLDivergence(), OutputError(), CSMPQ(), CLADO(loss="kl")])
def test_other_labels_are_nobodys_business_where_they_are_not_read(net, space, labels, proxy):
    """Losses are those of the bare images, also of a part of the batch."""
    for images in (IMAGES, IMAGES[:3]):
        n_images = len(images)
        scored = type(proxy)(**{**vars(proxy), "n_images": n_images})
        assert scored.score(net, space, [(IMAGES, labels)]).loss == scored.score(net, space, [IMAGES]).loss


@pytest.mark.parametrize("labels", [LABELS[:, None], LABELS.float(), LABELS[:3], nn.functional.one_hot(LABELS)])
def test_labels_of_another_shape_give_no_accuracy(net, labels):
    """A column of labels would be compared with every image."""
    with pytest.raises(DataError, match="one class index per image"):
        accuracy(net, [(IMAGES, labels)])


def test_outputs_that_are_no_logits_give_no_accuracy(net):
    """Three axes, or one."""
    for model in (nn.Sequential(net, nn.Unflatten(1, (3, 1))), nn.Sequential(net, nn.Flatten(0))):
        with pytest.raises(DataError, match="needs logits"):
            accuracy(model, [(IMAGES, LABELS)])


def test_one_image_is_told(net, space):
    """CSMPQ has nothing to tell apart, measured scores little to go by."""
    with pytest.warns(FewImagesWarning, match="there is one image"):
        CSMPQ().score(net, space, [IMAGES[:1]])
    with pytest.warns(FewImagesWarning, match="measured on one image"):
        CLADO().score(net, space, [(IMAGES[:1], LABELS[:1])])
