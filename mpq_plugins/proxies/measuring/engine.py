"""Runs of a model with some units quantized, fast: what does not depend on them is kept, not computed again."""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_plugins.errors import DataError, MPQError
from mpq_plugins.model.run import Batch, Output, batch_size, call, device_of, evaluating, select, telling_failures, to_device
from mpq_plugins.model.watch import WEIGHTED, LayerOfCall, input_argument
from mpq_plugins.proxies.measuring.correction import LEAST_IMAGES, Reference, correcting
from mpq_plugins.proxies.measuring.perturbation import AbstractCalls, Changes, Perturbation, run_changed
from mpq_plugins.proxies.measuring.replay import Counter, Replayer, Values
from mpq_plugins.proxies.measuring.trace import CannotReplay, record
from mpq_plugins.proxies.measuring.weights import QuantizedWeights, activation_steps
from mpq_plugins.space.space import Space

_MIB = 2**20
_AGREES = 1e-3  # largest difference between a replay and a plain pass, in standard deviations of the output
_STACKED_IMAGES = 8  # images in one stacked pass on the CPU: beyond that stacking variants gains nothing
_STACKED_ON_GPU = 8


class AbstractRun(abc.ABC):
    """One piece of a batch under some fixed changes (none, for the float model)."""

    output: Tensor

    @abc.abstractmethod
    def single(self, unit: int, choices: Sequence[int]) -> Iterator[Tensor]:
        """The model's output with `unit` quantized, for every choice in turn."""

    @abc.abstractmethod
    def under(self, unit: int, choice: int) -> AbstractRun:
        """The same piece with `unit` fixed at `choice` too."""


@final
@dataclass(frozen=True)
class Engine:
    """Quantizes units of `space` in `model` and runs it. Build it with `Engine.start`.

    `player` is None where the model cannot be played from a tape; `why_plain` then says why, and plain passes are used.
    """

    model: nn.Module
    space: Space
    variants: QuantizedWeights
    owner: LayerOfCall
    player: Replayer | None
    why_plain: str
    output: Output
    memory_bytes: int
    counter: Counter
    channels_last: bool = False
    stacking: bool = True
    correction: bool = False

    @classmethod
    def start(
        cls,
        model: nn.Module,
        space: Space,
        example: Batch,
        *,
        output: Output = None,
        per_channel: bool = True,
        memory_mb: int = 1024,
        replay: bool = True,
        folding: bool = True,
        correction: bool = False,
    ) -> Engine:
        """An engine for batches like `example`; `memory_mb` bounds what is kept beside the model and one pass.

        With `correction` quantized runs are corrected as a prepared network is, by the statistics of their own images.
        """
        memory_bytes = memory_mb * _MIB // 2  # half for quantized weights, half for kept activations
        variants = QuantizedWeights(model, space, per_channel=per_channel, cache_bytes=memory_bytes)
        for layer in space.layers:
            variants.own(layer.name)  # told now if it is not finite, not as an output that is not
        owner = LayerOfCall(model, space.layers)
        if space.searches_activations:
            with telling_failures(model):
                variants.activations = activation_steps(model, space, owner, example, output)
        plain = cls(model, space, variants, owner, None, "asked for", output, memory_bytes, Counter(), correction=correction)
        if not replay:
            return plain
        try:
            player = _player(model, space, owner, example, output, folding)
            variants.factors = player.factors
            # Depthwise convolutions are much faster with their channels last, dense ones are not.
            channels_last = any(layer.groups > 1 for layer in space.layers)
            engine = replace(plain, player=player, why_plain="", counter=player.counter)
            return _checked(engine, example, channels_last=channels_last)
        except CannotReplay as reason:
            return replace(plain, why_plain=str(reason))

    def pieces(self, batch: Batch) -> Iterator[Batch]:
        """`batch` in pieces of about one size whose kept values fit into the memory; of `LEAST_IMAGES` where none are kept.

        With `correction` a piece has at least `LEAST_IMAGES`, where the batch has, whatever memory that takes.
        """
        n_fitting = LEAST_IMAGES
        if self.player is not None:
            n_fitting = max(1, self.memory_bytes // max(1, self.player.tape.kept_bytes))
        n_pieces = -(-len(batch) // n_fitting)
        if self.correction:
            n_pieces = max(1, min(n_pieces, len(batch) // LEAST_IMAGES))
        ends = [len(batch) * piece // n_pieces for piece in range(n_pieces + 1)]
        for start, stop in itertools.pairwise(ends):
            yield batch.part(start, stop)

    def run(self, batch: Batch) -> AbstractRun:
        """The model on a piece of a batch, float but for the units that have only one choice.

        Raises `DataError` when the model fails on the batch.
        """
        inputs = self._on_device(batch)
        with telling_failures(self.model):
            if self.player is not None:
                with contextlib.suppress(CannotReplay):  # the course of some models changes with the number of images
                    changes = self.changes(self.pinned, merged=True)
                    values = self.player.base(inputs, changes, correction=self.correction)
                    return _ReplayedRun(self, inputs, self.pinned, values)
            return _PlainRun(self, inputs, self.pinned, _reference(self, inputs))

    def reference(self, batch: Batch) -> Reference | None:
        """What whole passes over a piece of a batch are corrected by; None without `correction`."""
        with telling_failures(self.model):
            return _reference(self, self._on_device(batch))

    def _on_device(self, batch: Batch) -> Any:
        inputs = to_device(batch.inputs, device_of(self.model))
        if self.channels_last and isinstance(inputs, Tensor) and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    @property
    def pinned(self) -> Mapping[int, int]:
        """The units that have only one choice, at that."""
        return {unit: 0 for unit, members in enumerate(self.space.units) if len(members.choices) == 1}

    def changes(self, choices: Mapping[int, int], *, merged: bool) -> Changes:
        """What some units at their choices make of their layers; `merged` with their batch normalisations."""
        found: dict[str, Sequence[Perturbation]] = {}
        for unit, choice in choices.items():
            found.update(self.variants.changes(unit, [choice], merged=merged))
        return found

    def quantized(self, batch: Batch, choice: Sequence[int], reference: Reference | None = None) -> Tensor:
        """The output with every unit quantized at its choice, corrected by `reference` if given."""
        changes = self.changes(dict(enumerate(choice)), merged=False)
        with telling_failures(self.model):
            return _plain(self, self._on_device(batch), changes, reference)


@final
class _PlainRun(AbstractRun):
    """Whole forward passes, for models that cannot be replayed; `fixed` holds the choices of units throughout."""

    def __init__(self, engine: Engine, inputs: Any, fixed: Mapping[int, int], reference: Reference | None) -> None:
        self._engine, self._inputs, self._fixed, self._reference = engine, inputs, fixed, reference
        self.output = self._at(fixed)

    def single(self, unit: int, choices: Sequence[int]) -> Iterator[Tensor]:
        for choice in choices:
            yield self._at({**self._fixed, unit: choice})

    def under(self, unit: int, choice: int) -> AbstractRun:
        return _PlainRun(self._engine, self._inputs, {**self._fixed, unit: choice}, self._reference)

    def _at(self, choices: Mapping[int, int]) -> Tensor:
        changes = self._engine.changes(choices, merged=False)
        return _plain(self._engine, self._inputs, changes, self._reference if changes else None)


@final
class _ReplayedRun(AbstractRun):
    """Passes that run only what depends on the changed unit."""

    def __init__(self, engine: Engine, inputs: Any, fixed: Mapping[int, int], values: Values) -> None:
        assert engine.player is not None
        self._engine, self._player, self._inputs, self._fixed, self._values = engine, engine.player, inputs, fixed, values
        self.output = values.output

    def single(self, unit: int, choices: Sequence[int]) -> Iterator[Tensor]:
        n_stacked = self._n_stacked()
        for start in range(0, len(choices), n_stacked):
            some = choices[start : start + n_stacked]
            yield from self._replay(unit, some).output.chunk(len(some))

    def under(self, unit: int, choice: int) -> AbstractRun:
        values = self._replay(unit, [choice], keep=True)
        return _ReplayedRun(self._engine, self._inputs, {**self._fixed, unit: choice}, values)

    def _replay(self, unit: int, choices: Sequence[int], *, keep: bool = False) -> Values:
        engine = self._engine
        changes = {
            **engine.changes(self._fixed, merged=True),
            **engine.variants.changes(unit, choices, merged=True),
        }
        roots = engine.space.units[unit].layers
        return self._player.replay(self._values, self._inputs, roots, changes, keep=keep)

    def _n_stacked(self) -> int:
        """How many variants run in one pass."""
        if not (self._engine.stacking and self._player.tape.stackable):
            return 1
        if self.output.device.type == "cuda":
            return _STACKED_ON_GPU
        return max(1, _STACKED_IMAGES // batch_size(self._inputs))


@final
class _Substitute(AbstractCalls):
    """Runs the model as it is, with changed layers; corrected by `reference` if given."""

    def __init__(self, engine: Engine, changes: Changes, reference: Reference | None) -> None:
        super().__init__()
        self._engine, self._changes, self._corrected = engine, changes, correcting(reference)

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        return self._corrected(func, args, kwargs, self._run(func, args, kwargs))

    def _run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if func not in WEIGHTED:
            return func(*args, **kwargs)
        self._engine.counter.run += int(input_argument(args, kwargs).shape[0])
        changes = self._changes.get(self._engine.owner.name(args, kwargs) or "")
        return func(*args, **kwargs) if changes is None else run_changed(func, args, kwargs, changes)


def _plain(engine: Engine, inputs: Any, changes: Changes, reference: Reference | None = None) -> Tensor:
    with evaluating(engine.model), engine.owner, _Substitute(engine, changes, reference):
        return select(call(engine.model, inputs), engine.output)


def _reference(engine: Engine, inputs: Any) -> Reference | None:
    """What whole passes over `inputs` are corrected by; None without correction."""
    if not engine.correction:
        return None
    model = engine.model
    reference = Reference(frozenset(id(tensor) for tensor in itertools.chain(model.parameters(), model.buffers())))
    with evaluating(model), engine.owner, reference:
        select(call(model, inputs), engine.output)
    return reference


def _player(model: nn.Module, space: Space, owner: LayerOfCall, example: Batch, output: Output, folding: bool) -> Replayer:
    """A player for the model. Raises `CannotReplay`."""
    device = device_of(model)
    # Two numbers of images tell what grows with them; a single image can stand twice.
    pair = example.part(0, 2) if len(example) > 1 else example.doubled()
    one, two = (to_device(images.inputs, device) for images in (example.part(0, 1), pair))
    with evaluating(model), owner, telling_failures(model):
        tape = record(model, owner, [layer.name for layer in space.layers], one, two, output)
    return Replayer(model, owner, tape, output=output, folding=folding)


def _checked(engine: Engine, example: Batch, *, channels_last: bool) -> Engine:
    """The engine, replaying in the first way that is right: with channels last, where wanted, and with variants stacked.

    Raises `CannotReplay` when no way is right. Some models reshape images as only the usual memory format allows; others
    take the number of images from their input, which does not count the variants.
    """
    for last, stacking in itertools.product((True, False) if channels_last else (False,), (True, False)):
        wanted = replace(engine, channels_last=last, stacking=stacking)
        try:
            _check(replace(wanted, correction=False), example)
        except (DataError, CannotReplay) as error:
            failure: Exception = error
        else:
            return wanted
    raise failure


def _check(engine: Engine, example: Batch) -> None:
    """Compare a replay of every unit at one choice with a plain pass, on one image; a second choice stacks with it.

    Narrow activations magnify what is left of the order of sums: a code of 4 bits that flips moves the output by more than the
    two may differ. So the choice is the first of the widest activations. Raises `CannotReplay` where they differ.
    """
    one = example.part(0, 1)
    run = engine.run(one)
    inputs = engine._on_device(one)
    for unit, members in enumerate(engine.space.units):
        widest = max(choice.activation for choice in members.choices)
        chosen = next(at for at, choice in enumerate(members.choices) if choice.activation == widest)
        ends = list(dict.fromkeys((chosen, len(members.choices) - 1))) if engine.stacking else [chosen]
        try:
            replayed = next(iter(run.single(unit, ends)))
        except MPQError:
            raise
        except Exception as error:
            raise CannotReplay(f"a replay with {members.name} changed fails: {type(error).__name__}: {error}") from error
        plain = _plain(engine, inputs, engine.changes({**engine.pinned, unit: chosen}, merged=False))
        if replayed.shape != plain.shape or not _agree(replayed, plain):
            raise CannotReplay(f"a replay with {members.name} at {members.choices[chosen]} differs from a plain pass")


def _agree(one: Tensor, other: Tensor) -> bool:
    bad = one.isfinite() != other.isfinite()
    apart = (one - other).abs().nan_to_num(0.0, 0.0, 0.0).max()
    return not bool(bad.any()) and bool(apart <= _AGREES * other.nan_to_num(0.0, 0.0, 0.0).std(correction=0) + 1e-6)
