"""Parameters that an optimizer must leave alone for a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

from torch import nn


@final
class Freezing:
    """Holds parameters exactly where they are, whatever the optimizer: no update, no decay, no momentum.

    Call `drop_gradients()` between the backward pass and the optimizer's step, before gradients are clipped. Optimizers of
    torch skip a parameter without gradient altogether, momentum kept from before included, where a learning rate of 0 would
    go on filling it. `requires_grad` stays on: quantizer ranges learn through the same gradient, and wrappers for data
    parallelism, made once, expect a gradient for every parameter.
    """

    def __init__(self) -> None:
        self.parameters: tuple[nn.Parameter, ...] = ()

    def hold(self, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze these parameters, and no others any more."""
        self.parameters = tuple(parameters)

    def drop_gradients(self) -> None:
        """Take the gradients of frozen parameters away."""
        for parameter in self.parameters:
            parameter.grad = None
