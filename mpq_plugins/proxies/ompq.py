"""OMPQ: units whose features depend least on the others' get the most bits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np

from mpq_plugins.errors import DataError
from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.utility import Utility, losses
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn

_log = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class OMPQ(AbstractProxy):
    """Network orthogonality (Ma et al., "OMPQ: Orthogonal Mixed Precision Quantization", arXiv 2109.07865), made sound.

    ORM_ij is the linear CKA of the feature maps of units i and j over images, gamma_i its sum over the other units that are
    free to choose, and theta_i = exp(-beta gamma_i) the importance. No labels are used.

    `estimator="debiased"` has no bias for few images: with N much smaller than the feature length the published, biased
    form is close to 1 for all pairs. `exponent="standardised"` is exp(-beta (gamma - min gamma) / std gamma), which
    cannot underflow. `suffix_mean` replaces theta_i by the mean of theta_j over j >= i, the published objective.
    `utility` is read by `losses`. At most `n_images` images are used; see `Dependence` for several batches.
    """

    name: ClassVar[str] = "ompq"
    estimator: Literal["debiased", "biased"] = "debiased"
    exponent: Literal["standardised", "raw"] = "standardised"
    beta: float = 1.0
    suffix_mean: bool = False
    utility: Utility = "concave"
    n_images: int = 256

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Losses from one forward pass; `facts` holds theta, gamma and the ORM matrix in the order of the units."""
        from mpq_plugins.proxies.features import observe
        from mpq_plugins.proxies.orthogonality import Dependence

        dependence = Dependence(len(space.units), self.estimator)
        n_seen = observe(model, space, batches, dependence, n_images=self.n_images)
        orm = dependence.orm()
        if n_seen < self.n_images:
            _log.warning("OMPQ was asked for %d images and was given %d: expect noisier scores.", self.n_images, n_seen)
        free = free_units(space)
        gamma = orm @ free - free
        theta = importance(gamma, free, beta=self.beta, exponent=self.exponent)
        check_underflow(theta, free, -self.beta * gamma, beta=self.beta)
        weights = suffix_means(theta, free) if self.suffix_mean else theta
        facts = {"theta": theta.tolist(), "gamma": gamma.tolist(), "orm": orm.tolist(), "n_images": dependence.n_used}
        return Scores(space, losses(model, space, weights.tolist(), self.utility), self.recipe(), facts)


def check_underflow(theta: Sequence[float] | np.ndarray, free: np.ndarray, exponents: np.ndarray, *, beta: float) -> None:
    """Raise `DataError` where exp of all free units' exponents is 0 in double precision, or of one infinite."""
    values = np.asarray(theta)[free > 0]
    if values.any() and np.isfinite(values).all():
        return
    least, most = float(exponents[free > 0].min()), float(exponents[free > 0].max())
    what = "underflows to 0 for every free layer" if not values.any() else "overflows"
    raise DataError(
        f"theta = exp(-beta x) {what}: beta is {beta:g}, -beta x lies between {least:.3g} and {most:.3g}, and exp has values "
        f"between -745 and 709 only. Take a beta of at most {abs(beta) * 700 / max(abs(least), abs(most)):.2g} in "
        "magnitude, or the proxies ompq and csmpq, whose importance cannot leave that range."
    )


def free_units(space: Space) -> np.ndarray:  # [unit]
    """1.0 for units with a decision to make, 0.0 for pinned ones, which the published program leaves out."""
    free = np.array([space.is_free(unit) for unit in space.units], dtype=float)
    return free if free.any() else np.ones_like(free)


def importance(
    gamma: np.ndarray, free: np.ndarray, *, beta: float, exponent: Literal["standardised", "raw"]
) -> np.ndarray:  # [unit]
    """theta of every unit, standardised over the free ones; 1 for all where gamma does not vary."""
    if exponent == "raw":
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(-beta * gamma))
    counted = gamma[free > 0]
    spread = counted.std()
    # Rounding alone makes equal gammas differ by some 1e-16.
    scaled = (gamma - counted.min()) / spread if spread > 1e-9 else np.zeros_like(gamma)
    return np.asarray(np.exp(-beta * np.maximum(scaled, 0.0)))


def suffix_means(theta: np.ndarray, free: np.ndarray) -> np.ndarray:  # [unit]
    """Mean of theta over the free units from each unit on; a unit after the last free one keeps its own."""
    totals, counts = np.cumsum((theta * free)[::-1])[::-1], np.cumsum(free[::-1])[::-1]
    return np.where(counts > 0, totals / np.maximum(counts, 1), theta)
