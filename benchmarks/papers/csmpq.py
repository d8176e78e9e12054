"""CSMPQ as its paper and code have it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
from torch import nn

from mpq_plugins import AbstractProxy, Scores, Space
from mpq_plugins.proxies.csmpq import documents_of
from mpq_plugins.proxies.ompq import check_underflow, free_units
from mpq_plugins.proxies.separability import channel_frequency
from mpq_plugins.proxies.utility import losses


@final
@dataclass(frozen=True)
class PublishedCSMPQ(AbstractProxy):
    """CSMPQ as its code computes it, to compare with: mean over all channels (about 1 / C), utility linear in bits.

    `mode="qat"` takes the score as importance, `"ptq"` takes exp(-beta score), which reverses the order of the units.
    `balance` is the k of the paper's factor ln(e C / k), None leaves it out; `n_images` is the published batch of 32.
    Use `CSMPQ` to allocate bits.
    """

    name: ClassVar[str] = "csmpq-published"
    mode: Literal["qat", "ptq"] = "qat"
    beta: float = 1.0
    balance: float | None = None
    n_images: int = 32

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Losses by the published objective; `facts` as in `CSMPQ`."""
        documents, n_seen = documents_of(model, space, batches, n_images=self.n_images, with_labels=False)
        separability = [published_tf_idf(unit, balance=self.balance) for unit in documents]
        theta = separability if self.mode == "qat" else _exponential(separability, space, self.beta)
        facts = {"theta": theta, "tf_idf": separability, "n_images": n_seen, "n_documents": n_seen}
        return Scores(space, losses(model, space, theta, "linear"), self.recipe(), facts)


def _exponential(values: Sequence[float], space: Space, beta: float) -> list[float]:
    """exp(-beta x) of every unit; raises `DataError` where that leaves what numbers can hold."""
    exponents = -beta * np.asarray(values)
    with np.errstate(over="ignore"):
        theta = np.exp(exponents)
    check_underflow(theta, free_units(space), exponents, beta=beta)
    found: list[float] = theta.tolist()
    return found


def published_tf_idf(documents: np.ndarray, *, balance: float | None = None) -> float:
    """CSMPQ's score as its code computes it: the mean over channels of TF ln(D / (|S| + 1)); about 1 / C.

    `balance` is the k of the factor ln(e C / k) on TF, equation (8) of arXiv 2212.10220; None leaves it out.
    """
    frequency, counts = channel_frequency(documents)
    inverse = np.log(documents.shape[1] / (counts + 1.0))
    kappa = 1.0 if balance is None else np.log(np.e * len(documents) / balance)
    return float(kappa * np.mean(frequency * inverse))
