"""Which outputs are logits of classes: scores, repairs and the default score ask one question."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq_plugins import Batch, Space, find_layers, menu
from mpq_plugins.adapter.repairs import Judge
from mpq_plugins.allocation import proxy_of
from mpq_plugins.model.run import are_class_logits
from mpq_plugins.proxies import CLADO


class Head(nn.Module):
    """A linear layer with something behind it."""

    def __init__(self, behind):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.behind = nn.Linear(6, 5), behind

    def forward(self, x):
        return self.behind(self.linear(x))


HEADS = {
    "logits": (nn.Identity(), True),
    "log probabilities": (nn.LogSoftmax(1), True),
    "sigmoids": (nn.Sigmoid(), False),
    "probabilities": (nn.Softmax(1), False),
    "unit rows": (F.normalize, False),
}


@pytest.mark.parametrize("kind", HEADS)
def test_probabilities_and_embeddings_are_no_logits(kind):
    """The default score, the judge of repairs and the loss of a score treat an output alike, with and without labels."""
    behind, expected = HEADS[kind]
    model, inputs, labels = Head(behind).eval(), torch.randn(16, 6) * 3, torch.arange(16) % 5
    output = model(inputs).detach()
    assert are_class_logits(output) is expected
    assert proxy_of("auto", model, inputs[:4]).name == ("kl-divergence" if expected else "output-error")
    assert Judge(model, [Batch(inputs)]).metric == ("KL divergence" if expected else "relative squared error")
    space = Space.build(find_layers(model, inputs[:1]), menu((2, 8)))
    for batch, loss in ((inputs, "kl"), ((inputs, labels), "cross_entropy")):
        auto = CLADO(cross=False).score(model, space, [batch]).loss
        named = CLADO(cross=False, loss=loss if expected else "squared_error").score(model, space, [batch]).loss
        assert auto == named


def test_one_column_and_nothing_are_no_classes():
    """A regression of one number and an empty output."""
    assert not are_class_logits(torch.randn(8, 1))
    assert not are_class_logits(torch.zeros(0, 5))
