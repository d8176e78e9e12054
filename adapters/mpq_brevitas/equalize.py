"""Equalization of a traced float graph: ranges moved between channels, so that fewer are lost in quantization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import internals as brevitas
from mpq_plugins.adapter.ptq import Equalization
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.discover import LAYER_TYPES
from mpq_plugins.model.run import Batch, call, tensors

_MIGRATION_STRENGTH = 0.5  # SmoothQuant's alpha
_TOLERANCE = 1e-3  # of the largest output


def equalize(graph: Any, norms: Mapping[str, Any], method: Equalization, batches: Sequence[Batch]) -> None:
    """Scale the channels between layers of `graph`, in place; it computes what it did.

    `norms` are the normalisations already merged into layers; their affine parameters follow their layer's channels.
    Raises `AdapterError` if the factors do not cancel out: Brevitas takes any product for one by a constant.
    """
    before = _outputs(graph, batches[0])
    _scale_channels(graph, norms, method, batches)
    for ours, theirs in zip(_outputs(graph, batches[0]), before, strict=True):
        if not torch.allclose(ours, theirs, rtol=0, atol=_TOLERANCE * max(1e-6, float(theirs.abs().max()))):
            raise AdapterError(
                f'equalization="{method}" changes what the traced graph computes, by up to '
                f'{float((ours - theirs).abs().max()):.2g}. Use equalization="none" for this model.'
            )


def _outputs(graph: Any, batch: Batch) -> list[Tensor]:
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(call(graph, batch.inputs))]


def _scale_channels(graph: Any, norms: Mapping[str, Any], method: Equalization, batches: Sequence[Batch]) -> None:
    if method == "cross-layer":
        with _following(graph, norms) as fill_biases:
            fill_biases()
            # Biases must not count: the factors are read off them.
            brevitas.EqualizeGraph(merge_bias=False).apply(graph)
    elif method == "smooth-quant":
        equalization = brevitas.GraphActivationEqualization(graph, add_mul_node=False)
        # Entered first: while it observes, Brevitas hides layers inside modules of other names.
        with _following(graph, norms) as fill_biases:
            equalization.setup()
            with torch.no_grad():
                for batch in batches:
                    call(graph, batch.inputs)
            fill_biases()
            equalization.apply(_MIGRATION_STRENGTH)


@contextlib.contextmanager
def _following(graph: Any, norms: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
    """Have biases and merged normalisations follow the factors that equalization gives their channels.

    A bias of ones comes out as those factors: what is yielded fills biases with ones, right before channels are scaled.
    """
    layers = {name: part for name, part in graph.named_modules() if isinstance(part, LAYER_TYPES) and part.bias is not None}
    biases: dict[str, Tensor] = {name: layer.bias.detach().clone() for name, layer in layers.items()}

    def fill_biases() -> None:
        for layer in layers.values():
            layer.bias.detach().fill_(1.0)

    yield fill_biases
    with torch.no_grad():
        for name, layer in layers.items():
            factors = layer.bias.detach().clone()
            layer.bias.copy_(biases[name] * factors)
            if name in norms:
                _scale(norms[name], factors)


def _scale(norm: Any, factors: Tensor) -> None:
    norm.weight = nn.Parameter(factors.clone() if norm.weight is None else norm.weight.detach() * factors)
    norm.bias = nn.Parameter(torch.zeros_like(factors) if norm.bias is None else norm.bias.detach() * factors)
