"""The stages of PROFIT, as data: how long each is, which bits it runs, and what it does to the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Annotated, Any, final

from mpq_plugins.common.values import Bounds, Count, check_values
from mpq_plugins.errors import ModelError, TrainingError
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import ACTIVATION_BITS, Precision

_WIDEST = ACTIVATION_BITS[-1]


@final
@dataclass(frozen=True)
class Stage:
    """A stretch of training at fixed bits.

    `bits` is None while the model is still float. `float_weights` says that only activations are quantized: `bits` then has
    the widest weights there are, for frameworks that cannot run them in float. `trains_weights` is off while batch
    normalisation, biases and ranges settle. `samples` marks where AIWQ is measured; `n_frozen` layers of the highest AIWQ
    stay as they are. Every stage restarts warm-up and learning-rate schedule.
    """

    name: str
    epochs: int
    bits: BitConfig | None = None
    float_weights: bool = False
    trains_weights: bool = True
    samples: bool = False
    n_frozen: int = 0


# The last is left out first when epochs are few.
_SAMPLING, _TRAINING, _FLOAT, _SETTLING = range(4)
_Ranked = tuple[Stage, int]


@final
@dataclass(frozen=True)
class ProfitSchedule:
    """PROFIT's schedule (Park and Yoo 2020, section 5.1): progressive lowering of bits, then progressive freezing.

    The defaults are the published lengths in epochs, 200 in all for 4-bit weights and activations: 15 in float; activations
    at 8, 5 and their target bits, then weights at 8 and 5, each 5 + 15 + 5, weights held in the 5s; at the target 5 weights
    held, 5 measuring AIWQ, 15 with all layers, 15 with the third of the layers of highest AIWQ frozen, 15 with two thirds, and
    5 weights held. Under a mixed configuration every layer goes down to its own target and never below; widths that change
    nothing are left out.
    """

    widths: tuple[Annotated[int, Bounds(least=2)], ...] = (8, 5)
    parts: Annotated[int, Bounds(least=1)] = 3
    float_epochs: Count = 15
    settle_epochs: Count = 5
    train_epochs: Count = 15
    sample_epochs: Count = 5

    def __post_init__(self) -> None:
        check_values(ProfitSchedule, vars(self), TrainingError, where="the schedule of PROFIT")
        object.__setattr__(self, "widths", tuple(self.widths))

    def stages(self, target: BitConfig, epochs: int | None = None) -> tuple[Stage, ...]:
        """The stages that lead to `target`, together `epochs` long in proportion to their lengths here (None: exactly these).

        Every stage has at least one epoch. With fewer epochs than stages, stages are left out, each kind from the first on:
        those that hold the weights, then float training, then the training before AIWQ is measured and the one with all
        layers. What measures AIWQ and what trains with frozen layers stays: raises `ModelError` below that many epochs.
        """
        planned = [item for item in self._planned(target) if item[0].epochs > 0]
        if epochs is None:
            return tuple(stage for stage, _ in planned)
        needed = max(1, sum(rank == _SAMPLING for _, rank in planned))
        if epochs < needed:
            raise ModelError(
                f"PROFIT needs at least {needed} epochs, one to measure the layers and one for each of the "
                f"{self.parts - 1} stages with frozen layers; {epochs} were given. Give more epochs, or train without PROFIT."
            )
        last = sorted(range(len(planned)), key=lambda at: (-planned[at][1], at))  # the first to be left out stand first
        surplus = [at for at in last if planned[at][1] != _SAMPLING][: max(0, len(planned) - epochs)]
        kept = [stage for at, (stage, _) in enumerate(planned) if at not in surplus]
        lengths = apportion([stage.epochs for stage in kept], epochs)
        return tuple(replace(stage, epochs=length) for stage, length in zip(kept, lengths, strict=True))

    def _planned(self, target: BitConfig) -> list[_Ranked]:
        planned = [(Stage("float", self.float_epochs), _FLOAT)]
        for label, bits in self._lowered(target, lambda own, width: Precision(_WIDEST, max(own.activation, width))):
            planned += self._around(label, bits, float_weights=True)
        lowered = list(self._lowered(target, lambda own, width: Precision(max(own.weight, width), own.activation), "weights"))
        for label, bits in lowered[:-1]:
            planned += self._around(label, bits)
        return planned + self._final(target)

    def _lowered(
        self, target: BitConfig, at: Callable[[Precision, int], Precision], what: str = "activations"
    ) -> list[tuple[str, BitConfig]]:
        """What `at` makes of the target at each width, without repetitions; the last is the target's own."""
        steps: list[tuple[str, BitConfig]] = []
        for width in (*self.widths, 0):
            layers = {name: at(own, width) for name, own in target.layers.items()}
            bits = replace(target, layers=layers)
            if steps and steps[-1][1] == bits:
                steps.pop()  # the later name says that it is the target
            steps.append((f"{what} at {width or 'target'} bits", bits))
        return steps

    def _around(self, label: str, bits: BitConfig, *, float_weights: bool = False) -> list[_Ranked]:
        stage = Stage(label, self.train_epochs, bits, float_weights)
        settle = replace(stage, epochs=self.settle_epochs, trains_weights=False)
        return [
            (replace(settle, name=f"{label}: settling"), _SETTLING),
            (stage, _TRAINING),
            (replace(settle, name=f"{label}: settling again"), _SETTLING),
        ]

    def _final(self, target: BitConfig) -> list[_Ranked]:
        settle = Stage("target bits: settling", self.settle_epochs, target, trains_weights=False)
        training = Stage("all layers", self.train_epochs, target)
        n_frozen = {part: len(target.layers) * part // self.parts for part in range(1, self.parts)}
        frozen = [
            replace(training, name=f"{part}/{self.parts} of the layers frozen", n_frozen=n) for part, n in n_frozen.items()
        ]
        return [
            (settle, _SETTLING),
            (Stage("measuring AIWQ", self.sample_epochs, target, samples=True), _SAMPLING),
            (training, _TRAINING),
            *((stage, _SAMPLING) for stage in frozen),
            (replace(settle, name="target bits: settling again"), _SETTLING),
        ]


def apportion(lengths: Sequence[int], total: int) -> list[int]:
    """Whole numbers of at least 1 that sum to `total`, in proportion to `lengths`, by the method of largest remainders.

    Those whose share is below 1 get 1, the others share the rest; of equal remainders the later is rounded up, because late
    stages train at the bits that stay.
    """
    least: set[int] = set()
    while True:
        others = [index for index in range(len(lengths)) if index not in least]
        rest = total - len(least)
        whole = sum(lengths[index] for index in others)
        quotas = {index: Fraction(lengths[index] * rest, whole) for index in others}
        below = {index for index, quota in quotas.items() if quota < 1}
        if not below:
            break
        least |= below
    shares = {index: int(quota) for index, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda index: (shares[index] - quotas[index], -index))
    for index in by_remainder[: rest - sum(shares.values())]:
        shares[index] += 1
    return [shares.get(index, 1) for index in range(len(lengths))]


def stage_at(stages: Iterable[Stage], epoch: int) -> tuple[int, int]:
    """The index of the stage that holds an epoch, counted from 0 over all stages, and the epoch's number within the stage."""
    passed = 0
    for index, stage in enumerate(stages):
        if epoch < passed + stage.epochs:
            return index, epoch - passed
        passed += stage.epochs
    raise IndexError(f"epoch {epoch} is beyond the {passed} epochs of the schedule.")


def outline(stages: Iterable[Stage]) -> list[Mapping[str, Any]]:
    """Names and lengths of stages as plain JSON values, by which a resumed run knows its schedule again."""
    return [{"name": stage.name, "epochs": stage.epochs} for stage in stages]
