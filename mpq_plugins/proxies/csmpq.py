"""CSMPQ: units whose channels tell images apart best get the most bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from mpq_plugins.errors import FewImagesWarning
from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.utility import Utility, losses
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


@final
@dataclass(frozen=True)
class CSMPQ(AbstractProxy):
    """Class separability (Wang et al., "CSMPQ: Class Separability Based Mixed-Precision Quantization", arXiv 2212.10220).

    Importance is the TF-IDF of a unit's channels over documents, corrected for the number of channels (`tf_idf` in
    `_separability`): large separability, more bits. `documents="images"` needs no labels, as in the published code;
    `"classes"` averages the features of each class first, which is what the paper's title describes, and needs labels.
    `utility` is read by `losses` in `_utility`. At most `n_images` images are used; several batches equal one large one.
    """

    name: ClassVar[str] = "csmpq"
    documents: Literal["images", "classes"] = "images"
    utility: Utility = "concave"
    n_images: int = 256

    @property
    def needs_labels(self) -> bool:
        """Only classes need labels."""
        return self.documents == "classes"

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Losses from one forward pass; `facts` holds the TF-IDF of every unit."""
        from mpq_plugins.proxies.separability import tf_idf

        documents, n_seen = _documents(model, space, batches, n_images=self.n_images, with_labels=self.needs_labels)
        theta = [tf_idf(unit) for unit in documents]
        facts = {"theta": theta, "tf_idf": theta, "n_images": n_seen, "n_documents": documents[0].shape[1]}
        return Scores(space, losses(model, space, theta, self.utility), self.recipe(), facts)


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
        from mpq_plugins.proxies.separability import published_tf_idf

        documents, n_seen = _documents(model, space, batches, n_images=self.n_images, with_labels=False)
        separability = [published_tf_idf(unit, balance=self.balance) for unit in documents]
        theta = separability if self.mode == "qat" else _exponential(separability, space, self.beta)
        facts = {"theta": theta, "tf_idf": separability, "n_images": n_seen, "n_documents": n_seen}
        return Scores(space, losses(model, space, theta, "linear"), self.recipe(), facts)


def _exponential(values: Sequence[float], space: Space, beta: float) -> list[float]:
    """exp(-beta x) of every unit; raises `DataError` where that leaves what numbers can hold."""
    import numpy as np

    from mpq_plugins.proxies.ompq import check_underflow, free_units

    exponents = -beta * np.asarray(values)
    with np.errstate(over="ignore"):
        theta = np.exp(exponents)
    check_underflow(theta, free_units(space), exponents, beta=beta)
    found: list[float] = theta.tolist()
    return found


def _documents(
    model: nn.Module, space: Space, batches: Iterable[Any], *, n_images: int, with_labels: bool
) -> tuple[list[np.ndarray], int]:
    """Pooled features [C, D] of every unit, and the number of images they come from."""
    from mpq_plugins.proxies.features import observe
    from mpq_plugins.proxies.separability import PooledFeatures

    features = PooledFeatures(len(space.units), with_labels=with_labels)
    n_seen = observe(model, space, batches, features, n_images=n_images)
    if n_seen < 2:
        warnings.warn("CSMPQ tells images apart, and there is one image: give 32 or more.", FewImagesWarning, stacklevel=3)
    return features.documents(), n_seen
