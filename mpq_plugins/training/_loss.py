"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins._errors import DataError
from mpq_plugins._model import Batch, Output, call, select, to_device

Loss = Callable[[Any, Batch], Tensor]
"""Takes what the module returned and the batch; gives a scalar."""


@final
@dataclass(frozen=True)
class Classification:
    """Cross-entropy to the labels, plus soft cross-entropy to a teacher's logits where there is a teacher.

    The soft part is -sum softmax(teacher / T) log_softmax(logits / T), times T^2 so that its gradients keep their size
    (Hinton et al. 2015); PROFIT uses T = 1 and adds both parts one to one.
    """

    output: Output = None
    label_smoothing: float = 0.0
    teacher: nn.Module | None = None
    teacher_weight: float = 1.0
    temperature: float = 1.0

    def __call__(self, result: Any, batch: Batch) -> Tensor:
        """The mean loss of a batch."""
        logits = select(result, self.output)
        if batch.labels is None:
            raise DataError("training needs labels, and a batch has none. Yield (inputs, labels) pairs, or give a loss.")
        loss = F.cross_entropy(logits, to_device(batch.labels, logits.device), label_smoothing=self.label_smoothing)
        if self.teacher is None or self.teacher_weight == 0:
            return loss
        with torch.no_grad():
            answer = call(self.teacher, batch.inputs)
            taught = answer if isinstance(answer, Tensor) else select(answer, self.output)
        return loss + self.teacher_weight * soft_cross_entropy(logits, taught, self.temperature)


def soft_cross_entropy(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over images of -T^2 sum softmax(teacher / T) log_softmax(logits / T), for logits [N, classes]."""
    target = F.softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.cross_entropy(logits.float() / temperature, target)
