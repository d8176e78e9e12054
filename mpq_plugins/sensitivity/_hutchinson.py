"""Traces of the Hessian blocks of weights, by Hutchinson's estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from mpq_plugins._flow import WEIGHTED, LayerOfCall
from mpq_plugins._model import Batch, call, evaluating, select
from mpq_plugins._progress import track
from mpq_plugins.sensitivity._change import Change, run_changed
from mpq_plugins.sensitivity._criteria import measure
from mpq_plugins.sensitivity._effects import Lab
from mpq_plugins.sensitivity._engine import telling_failures

_ROUND = 8  # probes that share a forward and a backward pass


@dataclass(frozen=True)
class Traces:
    """Mean trace of the Hessian block of every weight, and its standard error, by the weight's name."""

    mean: Mapping[str, float]
    error: Mapping[str, float]
    n_probes: int


def hessian_traces(lab: Lab, *, n_probes: int, tolerance: float) -> Traces:
    """The trace of d2Loss / dw2 of every free weight divided by its length, for the mean loss of the sensitivity set.

    v'Hv is averaged over probes v of random signs, drawn for all weights at once: what other weights add has mean zero.
    Every piece of the set has probes of its own. At most `n_probes` are drawn, less when the standard error of every
    trace falls to `tolerance` times its size.
    """
    names = sorted({lab.space.layer(name).weight_name for unit in lab.free for name in lab.space.units[unit].layers})
    samples = np.zeros((0, len(names)))  # [probe, weight]
    for first in track(range(0, n_probes, _ROUND), "rounds of Hessian probes"):
        probes = range(first, min(first + _ROUND, n_probes))
        samples = np.concatenate([samples, _round(lab, names, probes)])
        if _settled(samples, tolerance):
            break
    mean, error = samples.mean(0), _standard_error(samples)
    return Traces(dict(zip(names, mean.tolist(), strict=True)), dict(zip(names, error.tolist(), strict=True)), len(samples))


def _settled(samples: np.ndarray, tolerance: float) -> bool:
    return bool(np.all(_standard_error(samples) <= tolerance * np.abs(samples.mean(0))))


def _standard_error(samples: np.ndarray) -> np.ndarray:  # [weight]; zeros for a single probe
    if len(samples) < 2:
        return np.zeros(samples.shape[1])
    error: np.ndarray = samples.std(0, ddof=1) / np.sqrt(len(samples))
    return error


def _round(lab: Lab, names: Sequence[str], probes: range) -> np.ndarray:  # [probe, weight]
    total = np.zeros((len(probes), len(names)))
    for index, batch in enumerate(lab.pieces()):
        key = f"piece{index:05d}-hessian-{probes.start}-{probes.stop}"
        arrays = lab.journal.get(key)
        if arrays is None:
            arrays = {"products": _of_piece(lab, names, batch, index, probes)}
            lab.journal.put(key, arrays)
        total += arrays["products"]
    return total / lab.n_images


def _of_piece(lab: Lab, names: Sequence[str], batch: Batch, index: int, probes: range) -> np.ndarray:
    """v'Hv / length for the summed loss of a piece, by probe and weight."""
    model, engine = lab.model, lab.engine
    layers = {lab.space.layer(name).weight_name: name for unit in lab.free for name in lab.space.units[unit].layers}
    leaves = {weight: engine.variants.own(layers[weight]).requires_grad_(True) for weight in names}
    by_layer = {layer.name: leaves[layer.weight_name] for layer in lab.space.layers if layer.weight_name in leaves}
    # Only the plain form of attention can be differentiated twice.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        with evaluating(model), engine.owner, telling_failures(model), torch.enable_grad(), _Leaves(engine.owner, by_layer):
            output = select(call(model, batch.inputs), engine.output)
        generator = torch.Generator().manual_seed(lab.setup.seed + index)
        at_base = measure(lab.setup.loss, output.detach(), batch, n_samples=lab.setup.n_samples, generator=generator)
        gradients = torch.autograd.grad(
            at_base.losses(output).sum(), list(leaves.values()), create_graph=True, allow_unused=True
        )
        return np.stack([_products(list(leaves.values()), gradients, _generator(lab, index, probe)) for probe in probes])


def _products(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], generator: torch.Generator) -> np.ndarray:
    """v'Hv / length of every leaf, for one probe v."""
    signs = [torch.randint(0, 2, leaf.shape, generator=generator).to(leaf).mul_(2).sub_(1) for leaf in leaves]
    along = [
        (gradient * sign).sum()
        for gradient, sign in zip(gradients, signs, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not along:
        return np.zeros(len(leaves))
    products = torch.autograd.grad(torch.stack(along).sum(), leaves, retain_graph=True, allow_unused=True)
    return np.asarray(
        [
            0.0 if product is None else float((product * sign).sum(dtype=torch.float64)) / max(1, leaf.numel())
            for leaf, product, sign in zip(leaves, products, signs, strict=True)
        ]
    )


def _generator(lab: Lab, index: int, probe: int) -> torch.Generator:
    seed = np.random.SeedSequence([lab.setup.seed, index, probe]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


@final
class _Leaves(TorchFunctionMode):
    """Runs layers with other tensors in place of their weights, whatever the weights are: frozen, tied or computed."""

    def __init__(self, owner: LayerOfCall, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._owner, self._weights = owner, weights

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        layer = self._owner.name(args, kwargs) if func in WEIGHTED else None
        if layer not in self._weights:
            return func(*args, **kwargs)
        return run_changed(func, args, kwargs, [Change(self._weights[str(layer)])])
