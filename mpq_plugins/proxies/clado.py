"""CLADO: cross-layer sensitivities, and the forms of it that need one pass per unit and choice, or one backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np

from mpq_plugins.errors import PluginError
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import AbstractSensitivity, Loss, by_unit
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins.proxies.measuring import Effects


@final
@dataclass(frozen=True)
class CLADO(AbstractSensitivity):
    """Cross-layer dependency (Deng et al., "Mixed-Precision Quantization with Cross-Layer Dependencies", arXiv 2307.05657).

    The loss of a plan is x'Mx / 2 with the sensitivity of every choice on the diagonal of M and the interaction of every two
    choices beside it. `tier` says where M comes from, with L units of B choices:
    `exact`, as published: the loss with every two choices changed, about (L B)^2 / 2 forward passes;
    `gram`: L B forward passes. Sensitivities are the measured losses of single choices, interactions
    s E[r_i' (diag p - p p') r_j] with r the change of the logits and p the model's probabilities;
    `fisher`: one backward pass. With v the derivative of an image's loss along the quantization error, sensitivities are
    E[v_i^2] / 2 and interactions s E[v_i v_j]. The mean slope E[v] is left out: at a trained network it is zero but for noise.

    `shrinkage` is s: how much of the interactions counts. Those of few images are mostly noise, and an optimum looks for noise.
    None estimates s as the share of their squares that is no noise by their variance over images (James and Stein 1961).
    `expansion=True` is the second-order expansion of the loss in logits (`gram`) or weights (`fisher`) without any of this:
    its linear terms E[(p - y) . r] or E[v] are slopes, and s is 1.

    `cross=False` leaves the interactions out (the ablation of the paper). `clip` sets negative eigenvalues of M to zero, as
    published for `exact`: needed by convex solvers only, and it changes the objective.
    `per_channel=False` takes the published per-tensor quantizer, `correction=False` the published network: by default
    normalisations and biases are corrected in every measurement as in a prepared network. `loss` and the rest are those
    of `MeasurementOptions` in `mpq_plugins.proxies.measuring`. Activations are quantized together with weights where
    the space has several activation bits.
    """

    name: ClassVar[str] = "clado"
    tier: Literal["fisher", "gram", "exact"] = "gram"
    cross: bool = True
    clip: bool = False
    shrinkage: float | None = None
    expansion: bool = False
    loss: Loss = "auto"
    correction: bool = True
    n_samples: int = 0

    def __post_init__(self) -> None:
        if self.tier not in ("fisher", "gram", "exact"):
            raise PluginError(f"there is no tier {self.tier!r}. Choose fisher, gram or exact.")
        if self.shrinkage is None:
            return
        if not 0.0 <= self.shrinkage <= 1.0:
            raise PluginError(f"shrinkage is {self.shrinkage}, but is a share from 0 to 1. Leave it out to have it estimated.")
        if self.expansion or self.tier == "exact":
            form = "expansion" if self.expansion else "tier exact"
            raise PluginError(
                f"shrinkage has no meaning with {form}, whose interactions count whole. Leave one of the two out."
            )

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Sensitivities as losses and interactions as the pairwise term; `facts` holds the measured single losses."""
        from mpq_plugins.proxies.measuring import SensitivityRun, first_order_effects

        lab = SensitivityRun(model, space, batches, replace(self.setup(), replay=self.tier != "fisher"))
        pairs, curvature = self.cross and self.tier == "exact", self.cross and self.tier == "gram"
        effects = first_order_effects(lab) if self.tier == "fisher" else lab.effects(pairs=pairs, curvature=curvature)
        shrinkage = self._shrinkage(space, effects)
        linear, matrix = self._program(effects, shrinkage)
        facts = {"base_loss": effects.base_loss, **effects.facts}
        if self.tier != "fisher":
            facts["measured"] = effects.losses.tolist()
        if curvature or (self.cross and self.tier == "fisher"):
            facts["shrinkage"] = shrinkage
        return Scores(space, by_unit(space, linear), self.recipe(), facts, matrix)

    def _program(self, effects: Effects, shrinkage: float) -> tuple[np.ndarray, np.ndarray | None]:
        """Linear losses [choice] and the matrix [choice, choice] of the quadratic program."""
        if effects.slopes is not None and effects.curvature is not None:
            half = 0.5 * np.diag(effects.curvature)
            expanded = effects.slopes + half
            single = expanded if self.expansion else half if self.tier == "fisher" else effects.losses
            # A choice once more by itself is its own square: the matrix stays positive semidefinite.
            return (single - shrinkage * half, shrinkage * effects.curvature) if self.cross else (single, None)
        if effects.pairs is None:
            return effects.losses, None
        if not self.clip:
            return effects.losses, effects.pairs
        return np.zeros_like(effects.losses), _clipped(effects.pairs + np.diag(2 * effects.losses))

    def _shrinkage(self, space: Space, effects: Effects) -> float:
        """The factor of the interactions."""
        if self.expansion or self.shrinkage is not None or effects.curvature is None:
            return 1.0 if self.shrinkage is None else self.shrinkage
        return 0.0 if effects.noise is None else _reliability(space, effects.curvature, effects.noise)


def _reliability(space: Space, curvature: np.ndarray, noise: np.ndarray) -> float:
    """The share of the squared interactions of two units that their noise does not explain, all choices weighted alike."""
    scale = np.sqrt(np.maximum(np.diag(curvature), 0.0))
    weight = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0.0)
    unit = np.repeat(np.arange(len(space.units)), [len(members.choices) for members in space.units])
    apart = unit[:, None] != unit[None, :]
    of_products = np.outer(weight, weight)[apart] ** 2
    signal, chance = float((of_products * curvature[apart] ** 2).sum()), float((of_products * noise[apart]).sum())
    return max(0.0, 1.0 - chance / signal) if signal > 0.0 else 0.0


def _clipped(matrix: np.ndarray) -> np.ndarray:
    """The positive semidefinite matrix next to a symmetric one."""
    values, vectors = np.linalg.eigh(matrix)
    clipped: np.ndarray = (vectors * np.maximum(values, 0.0)) @ vectors.T
    both: np.ndarray = (clipped + clipped.T) / 2
    return both
