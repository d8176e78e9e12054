"""Layers that run although nothing reads what they give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from mpq_plugins.model.layers import Layer
from mpq_plugins.model.run import call, evaluating, tensors

REASON = "its output reaches no output of the model, so that exporters drop it"


def unread_layers(model: nn.Module, layers: Iterable[Layer], example: Any) -> dict[str, str]:
    """Layer name -> reason, for layers on whose weight no output of the model depends.

    Found by the graph that autograd records, and by changing the weight; nothing where no graph is, as behind an argmax.
    """
    parameters = dict(model.named_parameters())
    try:
        nothing = torch.zeros(())  # is kept of activations: only the graph counts
        forgetting = torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda _: nothing)
        with evaluating(model), _trainable(model), torch.enable_grad(), forgetting:
            outputs = list(tensors(call(model, example)))
    except Exception:  # what autograd cannot record; the pass without it is told elsewhere
        return {}
    if any(not tensor.requires_grad for tensor in outputs):
        return {}
    read = _leaves(outputs)
    suspects = {
        layer.name: parameters[layer.weight_name]
        for layer in layers
        if layer.weight_name in parameters and id(parameters[layer.weight_name]) not in read
    }
    # Autograd does not follow comparisons, indices and detached values.
    return {name: REASON for name, weight in suspects.items() if _changes_nothing(model, weight, example)}


def _changes_nothing(model: nn.Module, weight: nn.Parameter, example: Any) -> bool:
    """Whether the outputs stay the same with another weight."""
    kept = weight.detach().clone()
    with evaluating(model):
        before = list(tensors(call(model, example)))
        try:
            weight.mul_(-3).add_(1)
            after = list(tensors(call(model, example)))
        finally:
            weight.copy_(kept)
    return len(before) == len(after) and all(map(torch.equal, before, after))


@contextlib.contextmanager
def _trainable(model: nn.Module) -> Iterator[None]:
    """All parameters recorded for the time being."""
    frozen = [parameter for parameter in model.parameters() if parameter.is_floating_point() and not parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _leaves(outputs: Iterable[torch.Tensor]) -> set[int]:
    pending: list[Any] = [tensor.grad_fn for tensor in outputs]
    found, seen = {id(tensor) for tensor in outputs if tensor.is_leaf}, set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        pending += [following for following, _ in node.next_functions]
    return found
