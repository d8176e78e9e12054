"""CLADO: cross-layer sensitivities, and the forms of it that need one pass per unit and choice, or one backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import numpy as np

from mpq_plugins._scores import Scores
from mpq_plugins._space import Space
from mpq_plugins.proxies._sensitivity import AbstractSensitivity, by_unit

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins.sensitivity import Effects


@final
@dataclass(frozen=True)
class CLADO(AbstractSensitivity):
    """Cross-layer dependency (Deng et al., "Mixed-Precision Quantization with Cross-Layer Dependencies", arXiv 2307.05657).

    The loss of a plan is x'Mx / 2 with the sensitivity of every choice on the diagonal of M and the interaction of every two
    choices beside it. `tier` says where M comes from, with L units of B choices:
    `exact`, as published: the loss with every two choices changed, about (L B)^2 / 2 forward passes;
    `gram`: L B forward passes. With r the change of the logits, the linear term is E[(p - y) . r] and
    M = E[r_i' (diag p - p p') r_j], which is positive semidefinite by construction;
    `fisher`: one backward pass. With v the derivative of an image's loss along the quantization error, the linear term is
    E[v] and M = E[v_i v_j].

    `cross=False` leaves the interactions out (the ablation of the paper; the sensitivities are the measured ones). `clip` sets
    negative eigenvalues of M to zero, as published for `exact`: needed by convex solvers only, and it changes the objective.
    `per_channel=False` takes the published per-tensor quantizer, `correction=False` the published network: by default
    normalisations and biases are corrected in every measurement as in a prepared network. `loss` and the rest are those of
    `Setup` in `mpq_plugins.sensitivity`. Activations are quantized together with weights where the space has several activation
    bits.
    """

    name: ClassVar[str] = "clado"
    tier: Literal["fisher", "gram", "exact"] = "gram"
    cross: bool = True
    clip: bool = False
    loss: Literal["auto", "cross_entropy", "kl", "squared_error"] | Callable[..., Any] = "auto"
    per_channel: bool = True
    correction: bool = True
    n_images: int = 256
    n_samples: int = 0
    seed: int = 0
    output: str | int | Callable[..., Any] | None = None
    memory_mb: int = 1024

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Sensitivities as losses and interactions as the pairwise term; `facts` holds the measured single losses."""
        from mpq_plugins.sensitivity import Lab, first_order_effects

        lab = Lab(model, space, batches, self.setup())
        pairs, curvature = self.cross and self.tier == "exact", self.cross and self.tier == "gram"
        effects = first_order_effects(lab) if self.tier == "fisher" else lab.effects(pairs=pairs, curvature=curvature)
        linear, matrix = self._program(effects)
        facts = {"base_loss": effects.base_loss, **effects.facts}
        if self.tier != "fisher":
            facts["measured"] = effects.losses.tolist()
        return Scores(space, by_unit(space, linear), self.recipe(), facts, matrix)

    def _program(self, effects: Effects) -> tuple[np.ndarray, np.ndarray | None]:
        """Linear losses [choice] and the matrix [choice, choice] of the quadratic program."""
        if effects.slopes is not None and effects.curvature is not None:
            half = 0.5 * np.diag(effects.curvature)
            return (effects.slopes, effects.curvature) if self.cross else (effects.slopes + half, None)
        if effects.pairs is None:
            return effects.losses, None
        if not self.clip:
            return effects.losses, effects.pairs
        return np.zeros_like(effects.losses), _clipped(effects.pairs + np.diag(2 * effects.losses))


def _clipped(matrix: np.ndarray) -> np.ndarray:
    """The positive semidefinite matrix next to a symmetric one."""
    values, vectors = np.linalg.eigh(matrix)
    clipped: np.ndarray = (vectors * np.maximum(values, 0.0)) @ vectors.T
    both: np.ndarray = (clipped + clipped.T) / 2
    return both
