"""Playing a tape again with some layers changed: only the calls that depend on them run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_plugins.model.run import Output, batch_size, call, evaluating, select, tensors
from mpq_plugins.model.watch import WEIGHTED, LayerOfCall, bias_argument, input_argument, weight_argument
from mpq_plugins.proxies.measuring.correction import Corrector, Site, output_axis
from mpq_plugins.proxies.measuring.perturbation import AbstractCalls, Changes, Perturbation, run_changed
from mpq_plugins.proxies.measuring.trace import CannotReplay, ForwardTrace, is_metadata


@dataclass
class Counter:
    """How many layer evaluations have run, counted in images."""

    run: int = 0


@final
class Replayer:
    """Plays one tape; `folding` merges batch normalisations of constants into the layers before them."""

    def __init__(
        self, model: nn.Module, owner: LayerOfCall, tape: ForwardTrace, *, output: Output = None, folding: bool = True
    ) -> None:
        self.model, self.owner, self.tape, self.output = model, owner, tape, output
        self.norm_of: Mapping[int, int] = tape.norm_of if folding else {}
        self.folded = frozenset(self.norm_of.values())
        norms = {index: tape.calls[norm].norm for index, norm in self.norm_of.items()}
        self._norms = {index: norm for index, norm in norms.items() if norm is not None}  # norm_of lists calls that have one
        self.counter = Counter()
        self._plans: dict[int, Plan] = {}  # by the bits of the layers that change
        self._own_weights: dict[int, Tensor] = {}  # layer call -> its own weight with its batch normalisation

    @property
    def factors(self) -> dict[str, Tensor]:
        """Layer -> the factor per output channel of the batch normalisation that is merged into it."""
        return {str(self.tape.calls[index].layer): norm.factor for index, norm in self._norms.items()}

    def own_weight(self, index: int, weight: Tensor) -> Tensor:
        """The layer's own weight for this call, folded once."""
        if index not in self._own_weights:
            factor = self._norms[index].factor
            self._own_weights[index] = weight.detach() * factor.reshape(-1, *[1] * (weight.dim() - 1))
        return self._own_weights[index]

    def bias(self, index: int, bias: Tensor | None) -> Tensor:
        """The bias of a layer call with the batch normalisation that is merged into it."""
        norm = self._norms[index]
        return norm.shift if bias is None else bias.detach() * norm.factor + norm.shift

    @cached_property
    def sites(self) -> Mapping[int, Site]:
        """Calls whose values are corrected, as prepared networks are: norms, and layers with a bias that no norm reads."""
        calls = self.tape.calls
        found: dict[int, Site] = {}
        for index, step in enumerate(calls):
            if index in self.folded:
                continue
            norm = self._norms.get(index, step.norm)
            if norm is not None:
                found[index] = Site(1, norm)
            elif step.has_bias and all(calls[reader].norm is None for reader in self.tape.readers[index]):
                found[index] = Site(output_axis(step.function))
        return found

    def base(self, inputs: Any, changes: Changes, *, correction: bool = False) -> Values:
        """Run everything under `changes` and keep what later passes need.

        With `correction` this run and those that start from it are corrected by the statistics of the float network.
        """
        everything = Plan(self.tape, None)
        if not correction:
            return _Pass(self, everything, inputs, _NOTHING, changes).play()
        measured: dict[int, Corrector] = {}
        of_float = _Pass(self, everything, inputs, _NOTHING, {}, keep=not changes, measured=measured).play()
        if not changes:
            return replace(of_float, correctors=measured)
        return _Pass(self, everything, inputs, replace(_NOTHING, correctors=measured), changes).play()

    def replay(self, values: Values, inputs: Any, roots: Iterable[str], changes: Changes, *, keep: bool = False) -> Values:
        """Run what depends on the layers `roots`, everything else being as in `values`.

        `changes` holds the changes of all changed layers, of those in `values` too. With several variants per root
        they run stacked along the first axis. With `keep` the result serves as `values` of further passes.
        """
        roots = tuple(roots)
        n_variants = max(len(changes[name]) for name in roots)
        bits = self.tape.bits(roots)
        if bits not in self._plans:
            self._plans[bits] = Plan(self.tape, bits)
        return _Pass(self, self._plans[bits], inputs, values, changes, n_variants, keep=keep).play()


@dataclass(frozen=True)
class Values:
    """The output of a pass and the values that later passes read, by call.

    `correctors` hold what the float network has, by call, where passes are corrected.
    """

    output: Tensor
    kept: Mapping[int, Any] = field(repr=False)
    correctors: Mapping[int, Corrector] = field(repr=False, default_factory=dict)


_NOTHING = Values(torch.empty(0), {})


@final
class Plan:
    """Which calls run when the layers in `roots` change, and how the values of the others are served."""

    def __init__(self, tape: ForwardTrace, roots: int | None) -> None:
        self.roots = roots
        self.runs = [roots is None or bool(step.reach & roots) for step in tape.calls]
        self._tape = tape

    @cached_property
    def served(self) -> dict[int, tuple[str, int]]:
        """Call of a chain -> ("as", call whose kept value stands for it) or ("turn", call whose value its object takes)."""
        found: dict[int, tuple[str, int]] = {}
        for chain in self._tape.chains.values():
            still = [index for index in chain if not self.runs[index]]
            wanted = [index for index in still if self._is_wanted(index)]
            changed = any(self._tape.calls[index].mutates for index in chain if self.runs[index])
            if still and wanted and not changed and len(wanted) == 1:
                found.update((index, ("as", wanted[0])) for index in still)
            elif still and wanted:  # One object that takes the values in turn, and may be changed in place in the end.
                found.update((index, ("turn", index if index in wanted else wanted[0])) for index in still)
        return found

    def _is_wanted(self, index: int) -> bool:
        return index == self._tape.output or any(self.runs[reader] for reader in self._tape.readers[index])


@final
class _Pass(AbstractCalls):
    """One pass over the model's own Python, in which calls that need not run return what is kept of them."""

    def __init__(
        self,
        player: Replayer,
        plan: Plan,
        inputs: Any,
        values: Values,
        changes: Changes,
        n_variants: int = 1,
        *,
        keep: bool = True,
        measured: dict[int, Corrector] | None = None,
    ) -> None:
        super().__init__()
        self._kept: dict[int, Any] = {}
        self._cursor = 0
        self._player, self._tape, self._plan, self._inputs = player, player.tape, plan, inputs
        self._base, self._changes, self._n_variants, self._keep = values.kept, changes, n_variants, keep
        self._correctors, self._measured = values.correctors, measured
        self._changed = self._tape.bits(tuple(changes)) if values.correctors else 0
        n_images = batch_size(inputs)
        rows = [tensor for tensor in tensors(inputs) if tensor.dim() and tensor.shape[0] == n_images]
        self._single: dict[int, Tensor] = {id(tensor): tensor for tensor in rows}  # with the images of one variant only
        self._object: dict[int, Any] = {}  # chain head -> the object that its calls return in this pass

    def play(self) -> Values:
        """Run the model."""
        player = self._player
        with evaluating(player.model), player.owner, self:
            result = select(call(player.model, self._inputs), player.output)
        if self._cursor != len(self._tape.calls):
            raise CannotReplay("its forward pass ended early")
        return Values(result, {**self._base, **self._kept} if self._keep else self._base, self._correctors)

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if is_metadata(func):
            return func(*args, **kwargs)
        index = self._cursor
        self._cursor += 1
        if index >= len(self._tape.calls) or self._tape.calls[index].function != func:
            raise CannotReplay("its calls depend on the values of activations")
        if not self._plan.runs[index]:
            return self._serve(index)
        value = self._run(index, func, args, kwargs)
        if self._keep:
            self._hold(index, value)
        return value

    def _serve(self, index: int) -> Any:
        """The value of a call that does not run."""
        how, source = self._plan.served.get(index, ("as", index))
        if how == "turn":
            return self._in_turn(index, source)
        value = self._base[source]
        if self._tape.calls[index].grows:
            self._single.update((id(tensor), tensor) for tensor in tensors(value))
        return value

    def _in_turn(self, index: int, source: int) -> Any:
        head = self._tape.head_of[index]
        if head not in self._object:
            # For all variants at once: the model may go on with this object instead of what changes of it return.
            self._object[head] = self._repeated(source)
        elif source == index:
            self._object[head].copy_(self._repeated(source))
        return self._object[head]

    def _repeated(self, source: int) -> Tensor:
        """A copy of a kept value, one for every variant when it has images."""
        value: Tensor = self._base[source]
        if self._n_variants == 1 or not self._tape.calls[source].grows:
            return value.clone()
        return self._for_all(value)

    def _run(self, index: int, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if index in self._player.folded:
            return input_argument(args, kwargs)
        value = self._compute(index, func, args, kwargs)
        if func in WEIGHTED:
            self._player.counter.run += len(value)
        if self._measured is not None and index in self._player.sites:
            self._measured[index] = Corrector(value, self._player.sites[index])
        if index in self._correctors and self._tape.calls[index].reach & self._changed:
            self._correctors[index](value, self._n_variants)
        return value

    def _compute(self, index: int, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        layer = self._tape.calls[index].layer or ""
        is_folded = index in self._player.norm_of
        bias = self._player.bias(index, bias_argument(args, kwargs)) if is_folded else None
        if layer in self._changes:
            is_stacked = self._n_variants > 1 and id(input_argument(args, kwargs)) not in self._single
            return run_changed(func, args, kwargs, self._changes[layer], bias=bias, stacked=is_stacked)
        if self._n_variants > 1:
            args, kwargs = self._stacked(args), dict(zip(kwargs, self._stacked(tuple(kwargs.values())), strict=True))
        if is_folded:
            own = Perturbation(self._player.own_weight(index, weight_argument(args, kwargs)))
            return run_changed(func, args, kwargs, [own], bias=bias)
        return func(*args, **kwargs)

    def _stacked(self, values: Any) -> Any:
        """`values` with every tensor of one variant repeated for all of them."""
        return _mapped(values, lambda tensor: self._for_all(tensor) if id(tensor) in self._single else tensor)

    def _for_all(self, tensor: Tensor) -> Tensor:
        return tensor.repeat(self._n_variants, *[1] * (tensor.dim() - 1))

    def _hold(self, index: int, value: Any) -> None:
        """Keep the value of a call, or only its form where no later pass reads it."""
        if index not in self._tape.kept:
            # Something of the same shapes and types that takes no memory.
            self._kept[index] = _mapped(
                value, lambda tensor: torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
            )
            return
        chain = self._tape.chains.get(self._tape.head_of.get(index, -1), ())
        changes_later = any(self._tape.calls[other].mutates for other in chain if other > index)
        self._kept[index] = value.clone() if changes_later else value


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor changed, in lists and tuples too."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(_mapped(item, change) for item in value)
    return value
