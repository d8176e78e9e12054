"""What training minimises, against textbook formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq_plugins import Batch
from mpq_plugins.errors import DataError, TrainingError
from mpq_plugins.training import soft_cross_entropy
from mpq_plugins.training.loss import Classification
from mpq_plugins.training.refusals import check_loss

LOGITS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
TAUGHT = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_cross_entropy_is_divergence_plus_entropy(temperature):
    """-sum q log p equals KL(q || p) + H(q), times T^2."""
    p, q = (
        torch.distributions.Categorical(logits=LOGITS / temperature),
        torch.distributions.Categorical(logits=TAUGHT / temperature),
    )
    expected = (torch.distributions.kl_divergence(q, p) + q.entropy()).mean() * temperature**2
    assert soft_cross_entropy(LOGITS, TAUGHT, temperature).item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_keep_their_size_at_any_temperature():
    """At a high temperature the gradient approaches that of half the squared distance of centred logits over classes."""
    logits = LOGITS.clone().requires_grad_()
    soft_cross_entropy(logits, TAUGHT, 1000.0).backward()
    centred = (LOGITS - LOGITS.mean(1, keepdim=True)) - (TAUGHT - TAUGHT.mean(1, keepdim=True))
    torch.testing.assert_close(logits.grad, centred / LOGITS.numel(), rtol=0.02, atol=1e-4)


def test_label_smoothing_by_hand():
    """Smoothing by s takes (1 - s) of the label's and s of the mean log-probability."""
    log = torch.log_softmax(LOGITS, 1)
    expected = -(0.9 * log[range(6), LABELS] + 0.1 * log.mean(1)).mean()
    found = Classification(label_smoothing=0.1)(LOGITS, Batch(torch.zeros(6, 1), LABELS))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_teacher_is_added_with_its_weight_and_keeps_no_graph():
    """Cross-entropy plus weight times the soft part, read through `output` from both; the teacher gets no gradient."""

    class Teacher(nn.Linear):
        def forward(self, x):
            return {"logits": super().forward(x), "features": x}

    teacher, inputs = Teacher(3, 4), torch.randn(6, 3)
    loss = Classification("logits", teacher=teacher, teacher_weight=0.5, temperature=2.0)
    found = loss({"logits": LOGITS.clone().requires_grad_(), "features": inputs}, Batch({"x": inputs}, LABELS))
    expected = F.cross_entropy(LOGITS, LABELS) + 0.5 * soft_cross_entropy(LOGITS, teacher(inputs)["logits"], 2.0)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_without_labels_the_teacher_is_what_is_learned():
    """The soft part alone, with its weight; a teacher without weight teaches nothing and is no substitute for labels."""
    teacher, inputs = nn.Linear(3, 4), torch.randn(6, 3)
    loss = Classification(teacher=teacher, teacher_weight=0.5, temperature=2.0)
    expected = 0.5 * soft_cross_entropy(LOGITS, teacher(inputs), 2.0)
    assert loss(LOGITS, Batch(inputs)).item() == pytest.approx(expected.item(), rel=1e-6)
    with pytest.raises(DataError, match="needs labels or a teacher"):
        Classification(teacher=teacher, teacher_weight=0.0)(LOGITS, Batch(inputs))


def test_losses_that_cannot_be_trained_on_are_told():
    """Missing labels, a vector, a number and a detached scalar are errors that say what to give."""
    with pytest.raises(DataError, match="needs labels or a teacher"):
        Classification()(LOGITS, Batch(torch.zeros(6, 1)))
    weight = torch.ones(3, requires_grad=True)
    check_loss(weight.sum())
    for loss, text in ((weight * 2, r"shape \(3,\)"), (0.5, "a float"), (torch.tensor(0.5), "no trainable parameter")):
        with pytest.raises(TrainingError, match=text):
            check_loss(loss)
