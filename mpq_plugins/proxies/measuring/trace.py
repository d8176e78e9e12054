"""One forward pass written down: every call, the calls whose values it reads, and the layers that it depends on.

With it a pass can be played again with some layers changed, running only what depends on them. No graph is traced: the
model's own Python runs, and calls of torch functions are watched, so any module and any control flow is fine as long as it
does not depend on the activations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.errors import MPQError
from mpq_plugins.model.run import Output, batch_size, call, select, tensors
from mpq_plugins.model.watch import METADATA_NAMES, WEIGHTED, LayerOfCall, bias_argument, function_name
from mpq_plugins.proxies.measuring.correction import Norm
from mpq_plugins.proxies.measuring.perturbation import AbstractCalls

_TENSOR_PROPERTIES = frozenset(("T", "mT", "H", "mH", "data", "real", "imag", "grad"))
# Functions that give numbers to Python, and functions that take only the form of a tensor, not its values.
_READING_NAMES = frozenset(
    "item tolist numpy equal allclose is_nonzero __array__ __bool__ __complex__ __float__ __index__ __int__".split()
)
_FORM_NAMES = frozenset(
    "new_empty new_full new_ones new_tensor new_zeros empty_like full_like ones_like rand_like randn_like zeros_like".split()
)
_FOLDABLE = frozenset((torch.conv1d, torch.conv2d, torch.conv3d, F.linear))


class CannotReplay(MPQError):
    """The model does something that a tape cannot play again; plain forward passes still work. Says what."""


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    `sources` are the calls whose values it reads; `reach` has bit i set when it depends on layer i; `follows` is the call
    whose very object it returns (changed in place when `mutates`); `n_bytes` is the size of its value for one image.
    """

    function: Any
    sources: tuple[int, ...]
    reach: int
    layer: str | None = None
    follows: int | None = None
    mutates: bool = False
    n_bytes: int = 0
    rows: tuple[int, ...] = ()  # length of the first axis of every tensor of the value
    grows: bool = False  # the first axis grows with the number of images
    norm: Norm | None = None  # the batch normalisation it computes, when it computes one of constants
    has_bias: bool = False  # a weighted call that adds a bias


@final
@dataclass(frozen=True)
class ForwardTrace:
    """The calls of a forward pass in order, and the call of the model's output.

    `layers` are the names whose positions are the bits of `Call.reach`.
    """

    calls: tuple[Call, ...]
    output: int
    layers: tuple[str, ...]
    stackable: bool  # every value has its images on the first axis, so passes can be stacked along it

    def bits(self, names: Sequence[str]) -> int:
        """The set of layers as bits."""
        return sum(1 << self.layers.index(name) for name in dict.fromkeys(names))

    @cached_property
    def readers(self) -> tuple[tuple[int, ...], ...]:
        """The calls that read each call's value."""
        found: list[list[int]] = [[] for _ in self.calls]
        for index, step in enumerate(self.calls):
            for source in step.sources:
                found[source].append(index)
        return tuple(map(tuple, found))

    @cached_property
    def kept(self) -> frozenset[int]:
        """Calls whose values some pass needs while it does not run them: what is kept of the base pass."""

        def is_read(index: int) -> bool:
            own = self.calls[index].reach
            return index == self.output or any(self.calls[reader].reach & ~own for reader in self.readers[index])

        return frozenset(filter(is_read, range(len(self.calls))))

    @cached_property
    def norm_of(self) -> Mapping[int, int]:
        """Layer call -> the batch normalisation that is the only reader of its value, so that both can be one.

        Layers that are called several times are left as they are: each call may have another normalisation.
        """
        once = [layer for layer, n_calls in Counter(step.layer for step in self.calls).items() if layer and n_calls == 1]
        found = {}
        for index, step in enumerate(self.calls):
            source = step.sources[0] if step.norm is not None and len(step.sources) == 1 else None
            if source is None or source == self.output or self.readers[source] != (index,):
                continue
            if self.calls[source].layer in once and self.calls[source].function in _FOLDABLE:
                found[source] = index
        return found

    @cached_property
    def chains(self) -> Mapping[int, tuple[int, ...]]:
        """First call -> all calls that return its object one after the other, for objects returned more than once."""
        members: dict[int, list[int]] = {}
        head: dict[int, int] = {}
        for index, step in enumerate(self.calls):
            if step.follows is not None:
                head[index] = head.get(step.follows, step.follows)
                members.setdefault(head[index], [head[index]]).append(index)
        return {first: tuple(chain) for first, chain in members.items()}

    @cached_property
    def head_of(self) -> Mapping[int, int]:
        """Call of a chain -> the first call of it."""
        return {index: head for head, chain in self.chains.items() for index in chain}

    @property
    def kept_bytes(self) -> int:
        """Memory of the kept values, per image."""
        return sum(self.calls[index].n_bytes for index in self.kept)


def record(
    model: nn.Module, owner: LayerOfCall, layers: Sequence[str], one: Any, two: Any, output: Output = None
) -> ForwardTrace:
    """The tape of `model` in evaluation mode, from a pass over one image and a pass over another number of images.

    The two passes tell what changes with the batch from what does not. `one` and `two` may be the same object when
    there is only one image. Raises `CannotReplay`.
    """
    first = _Recorder(model, owner, layers, one, output)
    second = _Recorder(model, owner, layers, two, output)
    if [step.function for step in first.calls] != [step.function for step in second.calls]:
        raise CannotReplay("the calls of its forward pass change with the number of images")
    if [step.sources for step in first.calls] != [step.sources for step in second.calls]:
        raise CannotReplay("the flow of values in its forward pass changes with the number of images")
    if first.strangers.keys() - second.strangers.keys():
        raise CannotReplay("some values are made by operations that cannot be watched")
    n_images = (batch_size(one), batch_size(two))
    grow = [_grows(a.rows, b.rows, n_images) for a, b in zip(first.calls, second.calls, strict=True)]
    calls = tuple(
        replace(step, grows=bool(grown), n_bytes=step.n_bytes // n_images[0])
        for step, grown in zip(first.calls, grow, strict=True)
    )
    stackable = n_images[0] != n_images[1] and None not in grow
    return ForwardTrace(calls, first.output, tuple(layers), stackable)


def is_metadata(function: Any) -> bool:
    """Whether a torch function reads a shape or a flag only."""
    if function_name(function) == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "") not in _TENSOR_PROPERTIES
    return function_name(function) in METADATA_NAMES


def _grows(one: tuple[int, ...], two: tuple[int, ...], n_images: tuple[int, int]) -> bool | None:
    """Whether the first axes of a value grow with the number of images; None when the images lie elsewhere."""
    pairs = list(zip(one, two, strict=False))
    if all(a == b for a, b in pairs):
        return False
    return True if all(a * n_images[1] == b * n_images[0] for a, b in pairs) else None


class _Recorder(AbstractCalls):
    """Runs a forward pass and writes its calls down."""

    def __init__(self, model: nn.Module, owner: LayerOfCall, layers: Sequence[str], inputs: Any, output: Output) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.strangers: dict[int, Tensor] = {}  # tensors that no call made: constants, or made out of sight
        self._owner = owner
        self._bit = {name: 1 << index for index, name in enumerate(layers)}
        self._leaves = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *tensors(inputs))}
        self._maker: dict[int, int] = {}  # id of a tensor -> the last call that returned it
        self._version: dict[int, int] = {}  # id of a tensor -> its version when that call was done
        self._held: dict[int, Tensor] = {}
        self._used: set[int] = set()  # ids of tensors that calls depending on layers have read
        with self:
            result = select(call(model, inputs), output)
        if id(result) not in self._maker:
            raise CannotReplay("its output is not made by a torch function")
        self.output = self._maker[id(result)]
        self._check_unchanged(self._held.values())
        self._held.clear()

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if is_metadata(func):
            return func(*args, **kwargs)
        read = [*tensors(args), *tensors(kwargs)]
        self._check_unchanged(read)
        values = [] if function_name(func) in _FORM_NAMES else read
        sources = tuple(dict.fromkeys(self._maker[id(tensor)] for tensor in values if id(tensor) in self._maker))
        for tensor in read:
            if id(tensor) not in self._maker and id(tensor) not in self._leaves:
                self.strangers[id(tensor)] = tensor
        layer = self._owner.name(args, kwargs) if func in WEIGHTED else None
        versions = {id(tensor): tensor._version for tensor in read}
        value = func(*args, **kwargs)
        reach = self._bit.get(layer or "", 0)
        for source in sources:
            reach |= self.calls[source].reach
        if reach and function_name(func) in _READING_NAMES:
            raise CannotReplay("its forward pass takes numbers from activations, on which its course may depend")
        follows, mutates = self._passed_on(value, versions)
        if reach:
            self._used.update(versions)
        else:
            self._accept_changes()
        returned, norm = list(tensors(value)), Norm.of(func, args, kwargs)
        step = Call(
            func,
            sources,
            reach,
            layer,
            follows,
            mutates,
            n_bytes=sum(tensor.numel() * tensor.element_size() for tensor in returned),
            rows=tuple(tensor.shape[0] if tensor.dim() else 0 for tensor in returned),
            norm=None if norm is None or any(id(tensor) not in self._leaves for tensor in norm[1]) else norm[0],
            has_bias=func in WEIGHTED and bias_argument(args, kwargs) is not None,
        )
        for tensor in returned:
            self._maker[id(tensor)], self._version[id(tensor)] = len(self.calls), tensor._version
            self._held[id(tensor)] = tensor
        self.calls.append(step)
        return value

    def _passed_on(self, value: Any, versions: Mapping[int, int]) -> tuple[int | None, bool]:
        """The call whose very object a value is, and whether this call has changed it."""
        if not isinstance(value, Tensor) or id(value) not in versions:
            return None, False
        follows, mutates = self._maker.get(id(value)), value._version != versions[id(value)]
        if follows is None and mutates:
            raise CannotReplay("it changes its input or its parameters in place")
        if follows is not None and len(self.calls[follows].rows) != 1:
            raise CannotReplay("it passes on one of several returned tensors as the very same object")
        return follows, mutates

    def _accept_changes(self) -> None:
        """Let a call that depends on no layer change others like it, such as a mask filled by index, before their use."""
        for key, tensor in self._held.items():
            if self._version[key] != tensor._version and key not in self._used:
                self._version[key] = tensor._version

    def _check_unchanged(self, found: Any) -> None:
        for tensor in found:
            if self._version.get(id(tensor), tensor._version) != tensor._version:
                raise CannotReplay("it changes a tensor in place through a view or an index")
