"""OMPQ as its paper and code have it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

from torch import nn

from mpq_plugins import AbstractProxy, Scores, Space
from mpq_plugins.proxies import OMPQ


@final
@dataclass(frozen=True)
class PublishedOMPQ(AbstractProxy):
    """OMPQ as published, to compare with: biased CKA, exp(-beta gamma) as it is, means over later units, linear in bits.

    `n_images` is the batch of 32 that the published code takes. Use `OMPQ` to allocate bits.
    """

    name: ClassVar[str] = "ompq-published"
    beta: float = 1.0
    n_images: int = 32

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Losses by the published objective; `facts` as in `OMPQ`."""
        published = OMPQ(
            estimator="biased",
            exponent="raw",
            beta=self.beta,
            suffix_mean=True,
            utility="linear",
            n_images=self.n_images,
        )
        return replace(published.score(model, space, batches), proxy=self.recipe())
