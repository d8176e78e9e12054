"""Subclasses of torch's layers: which of them compute their parent's operation, and how they become Brevitas layers.

A subclass qualifies without a forward pass of its own, or with one that pads the input with zeros and calls the parent's
operation on its own weight: zeros are codes of every quantizer here, so quantizing before the padding is the same as after.
The Brevitas layer then runs the subclass's own forward pass on quantized values, and pads any input size as it does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mpq_brevitas import internals as brevitas
from mpq_plugins.adapter.hooks import PreHook, run_hooked
from mpq_plugins.model.run import evaluating
from mpq_plugins.model.watch import WEIGHTED, AbstractWatch, input_argument, weight_argument

_PARTS = ("_parameters", "_buffers", "_modules")
_COMPUTING = ("forward", "_conv_forward", "_output_padding")


def layer_class(module: nn.Module) -> type[nn.Module] | None:
    """The torch layer class that `module` is of or derives from."""
    return next((kind for kind in brevitas.QUANTIZED if isinstance(module, kind)), None)


def _parent_name(module: nn.Module) -> str:
    parent = layer_class(module)
    return "layer" if parent is None else parent.__name__


def computes_as_its_parent(module: nn.Module) -> bool:
    """Whether the module runs the very methods of its torch layer class."""
    parent = layer_class(module)
    return all(
        name not in vars(module) and getattr(type(module), name, None) is getattr(parent, name, None) for name in _COMPUTING
    )


def differing_forwards(model: nn.Module, modules: Mapping[str, nn.Module], example: Any) -> dict[str, str]:
    """Name -> how the forward pass of a module differs from padding and its parent's operation on `example`."""
    reasons: dict[str, str] = {}

    def checking(name: str) -> PreHook:
        def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reason = _difference(module, args, kwargs) if name not in reasons else None
            if reason is not None:
                parent = _parent_name(module)
                reasons[name] = f"{type(module).__name__} {reason}; Brevitas has layers for padding and {parent} only"

        return check

    run_hooked(model, [(module, checking(name)) for name, module in modules.items()], [example])
    return reasons


@final
class _CallWatch(AbstractWatch):
    """Keeps the convolution and linear calls that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Sequence[Any], Mapping[str, Any], Tensor]] = []

    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        self.calls.append((function, args, kwargs, output))


def _difference(module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> str | None:
    if len(inputs) != 1 or keywords or not isinstance(inputs[0], Tensor):
        return "is not called with one tensor by position"
    with _CallWatch() as watch:
        output = module.forward(*inputs)
    if len(watch.calls) != 1:
        return f"makes {len(watch.calls)} convolution or linear calls in its forward pass"
    function, args, kwargs, result = watch.calls[0]
    if WEIGHTED[function][0] != _parent_name(module):
        return f"computes a {WEIGHTED[function][0]} in its forward pass"
    if weight_argument(args, kwargs) is not module._parameters.get("weight"):
        return "computes another weight in its forward pass, as weight standardisation does"
    if (args[2] if len(args) > 2 else kwargs.get("bias")) is not module._parameters.get("bias"):
        return "computes another bias in its forward pass"
    padding = padding_of(inputs[0], input_argument(args, kwargs))
    if padding is None:
        return "changes its input by more than a padding with zeros"
    if any(name in vars(module) for name in _COMPUTING) and any(map(any, padding)):
        return "pads its input in a forward pass that is set on the instance"
    if not isinstance(output, Tensor) or output.shape != result.shape or not torch.equal(output, result):
        return "changes the result of the operation"
    return None


def padding_of(inner: Tensor, padded: Tensor) -> tuple[tuple[int, int], ...] | None:
    """Zeros before and after on every axis if `padded` is `inner` with zeros around it, else None."""
    if padded is inner:
        return ((0, 0),) * inner.dim()
    if padded.dim() != inner.dim() or padded.dtype != inner.dtype:
        return None
    extra = [outer - size for outer, size in zip(padded.shape, inner.shape, strict=True)]
    if min(extra, default=0) < 0 or torch.count_nonzero(padded) != torch.count_nonzero(inner):
        return None
    starts = itertools.product(*(sorted(range(more + 1), key=lambda start, more=more: abs(2 * start - more)) for more in extra))
    for start in starts:  # the even padding first
        if torch.equal(padded[tuple(slice(at, at + size) for at, size in zip(start, inner.shape, strict=True))], inner):
            return tuple((before, more - before) for before, more in zip(start, extra, strict=True))
    return None


def plain_form(module: nn.Module) -> nn.Module | None:
    """A shallow copy of the exact torch class that computes what `module` does on inputs of any size, or None.

    Padding that the subclass adds must be even and the same for every size; it becomes the layer's own padding.
    """
    parent = layer_class(module)
    if parent is None or parent is type(module) or type(module).__module__.startswith("torch."):
        return None
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return None
    plain = copy.copy(module)
    plain.__class__ = parent
    if computes_as_its_parent(module):
        return plain
    added = set()
    with evaluating(module):
        for probe in _probes(module, parent):
            with _CallWatch() as watch:
                try:
                    if _difference(module, (probe,), {}) is not None:
                        return None
                except Exception:  # any size may be wrong for a forward pass that is not known
                    return None
            _, args, kwargs, _ = watch.calls[0]
            padding = padding_of(probe, input_argument(args, kwargs))
            added.add(padding)
    if not _take_over(plain, added):
        return None
    with evaluating(module):
        equal = all(_agrees(module.forward(probe), parent.forward(plain, probe)) for probe in _probes(module, parent))
    return plain if equal else None


def _take_over(plain: nn.Module, added: Iterable[Any]) -> bool:
    """Give a layer the padding its subclass adds; False where that is not one even padding."""
    paddings = set(added)
    if len(paddings) != 1:
        return False
    padding = paddings.pop()
    if padding is None or any(before != after for before, after in padding) or any(map(any, padding[:2])):
        return False
    if any(map(any, padding)):
        own: Any = plain.padding
        if isinstance(own, str) or plain.padding_mode != "zeros" or type(plain).__name__.startswith("ConvTranspose"):
            return False
        plain.padding = tuple(mine + before for mine, (before, _) in zip(own, padding[2:], strict=True))
    return True


def _agrees(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.allclose(left, right, rtol=1e-4, atol=1e-5)


def _probes(module: Any, parent: type[nn.Module]) -> list[Tensor]:
    """Inputs of every remainder of the size by the stride."""
    generator = torch.Generator().manual_seed(0)
    if parent is nn.Linear:
        shapes = [(2, module.in_features)]
    else:
        reach = max(step * (size - 1) + 1 for step, size in zip(module.dilation, module.kernel_size, strict=True))
        n_axes = len(module.kernel_size)
        shapes = [(1, module.in_channels, *(2 * reach + more,) * n_axes) for more in range(max(module.stride) + 1)]
    return [torch.randn(shape, generator=generator).to(module.weight) for shape in shapes]


def make_plain(model: nn.Module) -> None:
    """Make every layer that has a plain form an exact torch layer, in place."""
    for module in model.modules():
        form = plain_form(module)
        if form is not None:
            if isinstance(getattr(form, "padding", None), tuple):
                module.padding = form.padding
            module.__class__ = type(form)


@dataclass(frozen=True)
class Subclass:
    """What a layer was before it was made an exact torch layer."""

    kind: type[nn.Module]
    attributes: Mapping[str, Any]


def as_exact_layers(model: nn.Module, names: Iterable[str]) -> dict[str, Subclass]:
    """Make the named layers exact torch layers, in place, which Brevitas takes; returns what the subclasses were."""
    modules, were = dict(model.named_modules()), {}
    for name in names:
        module = modules[name]
        parent = layer_class(module)
        if parent is not None and type(module) is not parent:
            were[name] = Subclass(type(module), {**vars(module), **{part: dict(vars(module)[part]) for part in _PARTS}})
            module.__class__ = parent
            for part in _PARTS:  # Brevitas loads the state of the layer strictly
                held = vars(module)[part]
                for key in [key for key in held if key not in ("weight", "bias")]:
                    del held[key]
    return were


def restore_forward(layer: nn.Module, was: Subclass) -> None:
    """Let a Brevitas layer run the forward pass of the subclass that it replaced, and hold what that held."""
    parent, known = layer_class(layer), vars(layer)
    for name, value in was.attributes.items():
        if name in _PARTS:
            for key, item in value.items():
                known[name].setdefault(key, item)
        elif name not in known:
            known[name] = value
    if any(getattr(was.kind, name, None) is not getattr(parent, name, None) for name in _COMPUTING):
        brevitas.run_forward_of(layer, was.kind)
