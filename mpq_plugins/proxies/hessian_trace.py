"""Hessian trace: the average curvature of the loss at a layer's weights, times their squared error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from mpq_plugins.errors import PluginError
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import AbstractSensitivity, Loss, weight_losses
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import Tensor, nn


@final
@dataclass(frozen=True)
class HessianTrace(AbstractSensitivity):
    """Tr(H) / n ||Q(w) - w||^2 with H the Hessian of the loss by a weight of length n, summed over the weights of a unit.

    HAWQ-V2 (Dong et al., arXiv 1911.03852, eq. 2.11), also the sensitivity of HAWQ-V3's integer program (Yao et al., arXiv
    2011.10680) and of NNCF 2's HAWQ. Traces are Hutchinson estimates from at most `n_probes`, less once a trace is known to a
    relative standard error of `tolerance`. `together` probes all weights at once, as NNCF 2 did: as many times cheaper as
    there are weights, and noisier. A negative estimate, a saddle or noise, counts as zero curvature.

    Without labels the loss is KL divergence from the float output, whose Hessian is the average over labels drawn from the
    model's own predictions. The model is in float, pinned units too. Activations do not count (`weight_losses` in
    `_sensitivity` says how ties are settled).
    """

    name: ClassVar[str] = "hessian-trace"
    n_probes: int = 64
    tolerance: float = 0.1
    together: bool = False
    loss: Loss = "auto"

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Losses by the published objective; `facts` holds mean traces and their standard errors by weight."""
        from mpq_plugins.proxies.measuring import SensitivityRun
        from mpq_plugins.proxies.measuring.hutchinson import hessian_traces

        if self.n_probes < 1:
            raise PluginError(f"n_probes is {self.n_probes}, but a trace needs at least one probe. Leave it at its default.")
        lab = SensitivityRun(model, space, batches, self.setup())
        traces = hessian_traces(lab, n_probes=self.n_probes, tolerance=self.tolerance, together=self.together)

        def error(layer: str, delta: Tensor) -> float:
            return max(0.0, traces.mean[space.layer(layer).weight_name]) * float(delta.double().square().sum())

        facts = {"mean_trace": dict(traces.mean), "standard_error": dict(traces.error), "n_probes": dict(traces.n_probes)}
        table = weight_losses(space, lab.engine.variants, error)
        return Scores(space, table, self.recipe(), {**facts, "n_images": lab.n_images})
