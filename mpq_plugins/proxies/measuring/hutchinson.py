"""Traces of the Hessian blocks of weights, by Hutchinson's estimator."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpq_plugins.common.progress import track
from mpq_plugins.model.run import Batch, call, evaluating, select, telling_failures
from mpq_plugins.model.watch import WEIGHTED, LayerOfCall
from mpq_plugins.proxies.measuring.effects import SensitivityRun
from mpq_plugins.proxies.measuring.perturbation import AbstractCalls, Perturbation, run_changed

_ROUND = 8  # probes that share a forward and a backward pass


@dataclass(frozen=True)
class Traces:
    """Mean trace of the Hessian block of every weight, its standard error and its number of probes, by the weight's name."""

    mean: Mapping[str, float]
    error: Mapping[str, float]
    n_probes: Mapping[str, int]


def hessian_traces(lab: SensitivityRun, *, n_probes: int, tolerance: float, together: bool = False) -> Traces:
    """The trace of d2Loss / dw2 of every free weight divided by its length, for the mean loss of the sensitivity set.

    v'Hv is averaged over probes v of random signs; every piece of the set has probes of its own. At most `n_probes` are drawn
    for a weight, less when its standard error falls to `tolerance` times its trace. A probe is for one weight, or with
    `together` for all of them: a single backward pass then, and the products of different weights add noise of mean zero.
    """
    samples: dict[str, list[float]] = {weight: [] for weight in _free_weights(lab)}
    for first in track(range(0, n_probes, _ROUND), "rounds of Hessian probes"):
        open_ = [weight for weight, found in samples.items() if not _settled(found, tolerance)]
        if not open_:
            break
        for weight, found in _round(lab, open_, range(first, min(first + _ROUND, n_probes)), together).items():
            samples[weight] += found.tolist()
    return Traces(
        {weight: float(np.mean(found)) for weight, found in samples.items()},
        {weight: _standard_error(found) for weight, found in samples.items()},
        {weight: len(found) for weight, found in samples.items()},
    )


def _free_weights(lab: SensitivityRun) -> dict[str, str]:
    """The weights of free units, each with one layer that holds it."""
    return {weight: name for unit in lab.free for weight, name in lab.space.weights(lab.space.units[unit]).items()}


def _settled(samples: Sequence[float], tolerance: float) -> bool:
    return len(samples) > 1 and _standard_error(samples) <= tolerance * abs(float(np.mean(samples)))


def _standard_error(samples: Sequence[float]) -> float:
    return float(np.std(samples, ddof=1) / math.sqrt(len(samples))) if len(samples) > 1 else 0.0


def _round(lab: SensitivityRun, weights: Sequence[str], probes: range, together: bool) -> dict[str, np.ndarray]:
    """v'Hv / length of each of the weights for each probe [probe], averaged over the sensitivity set."""
    total = {weight: np.zeros(len(probes)) for weight in weights}
    for index, batch in enumerate(lab.pieces()):
        key = f"piece{index:05d}-hessian{'-together' if together else ''}-{probes.start}-{probes.stop}"
        arrays = lab.journal.get(key) or {}
        missing = [weight for weight in weights if weight not in arrays]
        if missing:
            arrays |= _of_piece(lab, missing, batch, index, probes, together)
            lab.journal.put(key, arrays)
        total = {weight: total[weight] + arrays[weight] / lab.n_images for weight in weights}
    return total


def _of_piece(
    lab: SensitivityRun, weights: Sequence[str], batch: Batch, index: int, probes: range, together: bool
) -> dict[str, np.ndarray]:
    """The same, summed over the images of a piece."""
    model, engine = lab.model, lab.engine
    leaves = {weight: engine.variants.own(_free_weights(lab)[weight]).requires_grad_(True) for weight in weights}
    by_layer = {layer.name: leaves[layer.weight_name] for layer in lab.space.layers if layer.weight_name in leaves}
    with sdpa_kernel(SDPBackend.MATH):  # the only form of attention that can be differentiated twice
        with evaluating(model), engine.owner, telling_failures(model), torch.enable_grad(), _Leaves(engine.owner, by_layer):
            output = select(call(model, batch.inputs), engine.output)
        at_base = lab.measure(output.detach(), batch, lab.generator(index))
        with torch.enable_grad():
            loss = at_base.losses(output).sum()
            found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, allow_unused=True)
        gradients = dict(zip(leaves, found, strict=True))
        products = {weight: np.zeros(len(probes)) for weight in weights}
        for group in [list(weights)] if together else [[weight] for weight in weights]:
            for row, probe in enumerate(probes):
                signs = {weight: _signs(lab, leaves[weight], weight, index, probe) for weight in group}
                for weight, product in _products(leaves, gradients, signs).items():
                    products[weight][row] = product
    return products


def _products(
    leaves: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], signs: Mapping[str, Tensor]
) -> dict[str, float]:
    """v'Hv / length of the weights that have signs, for the probe of those signs."""
    found = {weight: gradients[weight] for weight in signs}
    # A loss that is linear in a weight has a gradient that depends on nothing.
    along = [(slope * signs[weight]).sum() for weight, slope in found.items() if slope is not None and slope.requires_grad]
    if not along:
        return dict.fromkeys(signs, 0.0)
    wanted = [leaves[weight] for weight in signs]
    products = torch.autograd.grad(torch.stack(along).sum(), wanted, retain_graph=True, allow_unused=True)
    return {
        weight: 0.0 if product is None else float((product * sign).sum(dtype=torch.float64)) / max(1, sign.numel())
        for (weight, sign), product in zip(signs.items(), products, strict=True)
    }


def _signs(lab: SensitivityRun, leaf: Tensor, weight: str, index: int, probe: int) -> Tensor:
    entropy = [lab.setup.seed, zlib.crc32(weight.encode()), index, probe]
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
    return torch.randint(0, 2, leaf.shape, generator=generator).to(leaf).mul_(2).sub_(1)


@final
class _Leaves(AbstractCalls):
    """Runs layers with other tensors in place of their weights, whatever the weights are: frozen, tied or computed."""

    def __init__(self, owner: LayerOfCall, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._owner, self._weights = owner, weights

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        layer = self._owner.name(args, kwargs) if func in WEIGHTED else None
        if layer not in self._weights:
            return func(*args, **kwargs)
        return run_changed(func, args, kwargs, [Perturbation(self._weights[str(layer)])])
