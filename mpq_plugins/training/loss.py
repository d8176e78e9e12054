"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.errors import DataError
from mpq_plugins.model.run import Batch, Output, call, labels_of, select

Loss = Callable[[Any, Batch], Tensor]
"""Takes what the module returned and the batch; gives a scalar."""


@final
@dataclass(frozen=True)
class Classification:
    """Cross-entropy to the labels, plus soft cross-entropy to a teacher's logits where there is a teacher.

    The soft part is -sum softmax(teacher / T) log_softmax(logits / T), times T^2 so that its gradients keep their size
    (Hinton et al. 2015); PROFIT uses T = 1 and adds both parts one to one. Batches without labels have the soft part alone.
    """

    output: Output = None
    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    teacher_weight: float = 1.0
    temperature: float = 1.0

    def __call__(self, result: Any, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        logits = select(result, self.output)
        is_taught = self.teacher is not None and self.teacher_weight > 0
        if batch.labels is None and not is_taught:
            raise DataError(
                "training needs labels or a teacher, and a batch has no labels. Yield (inputs, labels) pairs, or give a loss, "
                "or a teacher and a teacher_weight above 0."
            )
        parts: list[Tensor] = []
        if batch.labels is not None:
            labels = labels_of(batch).to(logits.device)
            parts.append(F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing))
        if is_taught:
            parts.append(self.teacher_weight * soft_cross_entropy(logits, self._taught(batch), self.temperature))
        return sum(parts[1:], parts[0])

    @torch.no_grad()
    def _taught(self, batch: Batch) -> Tensor:
        assert self.teacher is not None  # the caller asked
        answer = call(self.teacher, batch.inputs)
        return answer if isinstance(answer, Tensor) else select(answer, self.output)


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over images of -T^2 sum softmax(teacher / T) log_softmax(logits / T), for logits [N, classes]."""
    target = F.softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.cross_entropy(logits.float() / temperature, target)
