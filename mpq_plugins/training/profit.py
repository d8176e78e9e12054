"""PROFIT in a few calls from any training loop."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

from torch import nn

from mpq_plugins.common.files import check_keys
from mpq_plugins.errors import FormatError, ModelError
from mpq_plugins.training.instability import Instability, values_of
from mpq_plugins.training.parameter_groups import parameter_groups
from mpq_plugins.training.schedule import Stage, outline
from mpq_plugins.training.weights import weights_of

FORMAT = "mpq-profit/1"


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


@final
class Profit:
    """Progressive freezing for quantization-aware training (PROFIT, Park and Yoo 2020): what happens to which weights when.

    The loop stays the user's; it makes these calls:

        profit = Profit(ProfitSchedule(float_epochs=0).stages(bits, epochs=60))
        module = adapter.prepare(model, profit.stages[0].bits, example, calibration)
        for index, stage in enumerate(profit.stages):
            adapter.set_bits(module, stage.bits, calibration)
            adapter.use_float_weights(module, stage.float_weights)
            profit.on_stage(index, module)
            optimizer = SGD(parameter_groups(module, learning_rate=0.04, weight_decay=4e-5), momentum=0.9, nesterov=True)
            for epoch in range(stage.epochs):
                profit.on_epoch()
                module.train()
                for images, labels in batches:
                    optimizer.zero_grad()
                    with profit.forward():
                        loss = cross_entropy(module(images), labels)
                    loss.backward()
                    profit.on_step()                             # before gradients are clipped
                    optimizer.step()

    What a checkpoint must hold is `state_dict()`, plain JSON values, beside the module's and the optimizer's own: a run
    resumed at an epoch's start goes on exactly as one that was never stopped.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._index: int | None = None
        self._freezing = Freezing()
        self._instability: Instability | None = None
        self._saved: Mapping[str, Any] | None = None
        self._frozen: tuple[str, ...] = ()

    @property
    def stage(self) -> Stage:
        """The stage that `on_stage` started last."""
        if self._index is None:
            raise ModelError("no stage was started yet. Call on_stage(0, module) first.")
        return self.stages[self._index]

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers whose weights stay as they are because of their instability, the most unstable first."""
        return self._frozen

    @property
    def instability(self) -> dict[str, float]:
        """Layer name -> AIWQ as measured so far; empty before the module has target bits. See `Instability.values`."""
        if self._instability is not None:
            return self._instability.values
        return {} if self._saved is None else values_of(self._saved)  # resumed in a stage that measures nothing

    @property
    def meter(self) -> Instability | None:
        """The measuring itself, for processes that must agree on it (`Instability.average`); None before target bits."""
        return self._instability

    def on_stage(self, index: int, module: nn.Module) -> Stage:
        """Start stage number `index` with `module`, which already has the stage's bits; returns the stage.

        Raises `ModelError` when layers are to be frozen and none was measured.
        """
        self._index, self._frozen = index, ()
        stage = self.stage
        self._prepare_measuring(module, stage)
        held = weights_of(module, self._most_unstable(stage)) if stage.n_frozen else {}
        self._frozen = tuple(held)
        parameters = [parameter for weight in held.values() for parameter in weight]
        if not stage.trains_weights:
            weights, *_ = parameter_groups(module, learning_rate=0.0, weight_decay=0.0)
            parameters = weights["params"]
        self._freezing.hold(parameters)
        return stage

    def _prepare_measuring(self, module: nn.Module, stage: Stage) -> None:
        if stage.bits is None or not (stage.samples or stage.n_frozen):
            return
        measured = self._saved if self._instability is None else self._instability.to_json()
        self._instability = Instability(module, stage.bits.layers)
        if measured is not None:
            self._instability.restore(measured)

    def _most_unstable(self, stage: Stage) -> tuple[str, ...]:
        if self._instability is None or not self._instability.n_measured:
            raise ModelError(
                f"stage {stage.name!r} freezes the layers of highest AIWQ, and none was measured. Run the stage that measures "
                "it first, its forward passes inside `with profit.forward():`, and call on_step() at every step."
            )
        return self._instability.order[: stage.n_frozen]

    def on_epoch(self) -> None:
        """Say that an epoch, or another stretch between two checkpoints, begins."""
        # A resumed run cannot compare its first step with weights it never saw; neither then may one that was not stopped.
        if self._instability is not None:
            self._instability.forget_weights()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around each forward pass of training: measures AIWQ in the stage that samples it, else does nothing."""
        if self.stage.samples and self._instability is not None:
            with self._instability.watching():
                yield
        else:
            yield

    def on_step(self) -> None:
        """Between the backward pass and the optimizer's step, before gradients are clipped: frozen weights get no gradient."""
        self._freezing.drop_gradients()
        if self.stage.samples and self._instability is not None:
            self._instability.on_step()

    def parameter_groups(self, module: nn.Module, *, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
        """See `mpq_plugins.training.parameter_groups`."""
        return parameter_groups(module, learning_rate=learning_rate, weight_decay=weight_decay)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule stands and what was measured, as plain JSON values."""
        measured = self._saved if self._instability is None else self._instability.to_json()
        return {"format": FORMAT, "stages": outline(self.stages), "stage": self._index, "instability": measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back `state_dict()`; then start the saved stage again with `on_stage(state["stage"], module)`.

        Raises `FormatError` for a state of another schedule.
        """
        keys = {"format", "stages", "stage", "instability"}
        check_keys(state, allowed=keys, required=keys, where="the saved state of PROFIT")
        if state["format"] != FORMAT or state["stages"] != outline(self.stages):
            raise FormatError(
                f"the saved state of PROFIT is of another schedule ({state['format']}, {len(state['stages'])} stages; here "
                f"{FORMAT}, {len(self.stages)} stages). Resume with the bits and the number of epochs of the first run."
            )
        self._index, self._saved, self._instability = state["stage"], state["instability"], None
