"""CSMPQ: units whose channels tell images apart best get the most bits."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
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
    `proxies.separability`): large separability, more bits. `documents="images"` needs no labels, as in the published code;
    `"classes"` averages the features of each class first, which is what the paper's title describes, and needs labels.
    `utility` is read by `losses` in `proxies.utility`. At most `n_images` images are used; several batches equal one large one.
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

        documents, n_seen = documents_of(model, space, batches, n_images=self.n_images, with_labels=self.needs_labels)
        theta = [tf_idf(unit) for unit in documents]
        facts = {"theta": theta, "tf_idf": theta, "n_images": n_seen, "n_documents": documents[0].shape[1]}
        return Scores(space, losses(model, space, theta, self.utility), self.recipe(), facts)


def documents_of(
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
