"""The running average of a module's tensors over the steps of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@final
class Averaged:
    """Exponential moving average of parameters and buffers, by name.

    Of two averages torch offers, one copies the module (frameworks' hooks do not all survive that) and none can be swapped
    in and out. The decay starts low, min(decay, (1 + n) / (10 + n)) at step n, so that short stages forget where they began.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.n_steps = decay, 0
        self._own: dict[str, Tensor] = dict((*module.named_parameters(), *module.named_buffers()))
        self._average = {name: tensor.detach().clone() for name, tensor in self._own.items()}
        self._floating = [name for name, tensor in self._own.items() if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take up the module's present values, after an optimizer's step."""
        decay = min(self.decay, (1 + self.n_steps) / (10 + self.n_steps))
        self.n_steps += 1
        averages = [self._average[name] for name in self._floating]
        # All tensors in one call: a launch for each would cost a GPU more than the arithmetic.
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        average(averages, [self._own[name] for name in self._floating], self.n_steps)
        for name in self._own.keys() - set(self._floating):
            self._average[name].copy_(self._own[name])

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The module with the averaged values, for the time being."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def settle(self) -> None:
        """Leave the averaged values in the module for good."""
        for name, tensor in self._own.items():
            tensor.copy_(self._average[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self._own.items():
            kept = tensor.clone()
            tensor.copy_(self._average[name])
            self._average[name].copy_(kept)

    def state_dict(self) -> dict[str, object]:
        """The average, for a checkpoint."""
        return {"n_steps": self.n_steps, "average": dict(self._average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back `state_dict()`."""
        self.n_steps = state["n_steps"]
        for name, tensor in self._average.items():
            tensor.copy_(state["average"][name])
