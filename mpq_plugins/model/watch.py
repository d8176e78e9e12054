"""Watching a forward pass: which weighted operation runs, on what, and where its feature map ends.

Operations are told apart by the *parameter* they read, not by module class or scope, so modules called twice,
functional calls and tied weights all resolve. No graph is traced, hence any Python control flow is fine.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpq_plugins.model.layers import Layer

# function -> (kind of layer it computes, axis of the output channels in its weight)
WEIGHTED: Mapping[Any, tuple[str, int]] = {
    torch.conv1d: ("Conv1d", 0),
    torch.conv2d: ("Conv2d", 0),
    torch.conv3d: ("Conv3d", 0),
    torch.conv_transpose1d: ("ConvTranspose1d", 1),
    torch.conv_transpose2d: ("ConvTranspose2d", 1),
    torch.conv_transpose3d: ("ConvTranspose3d", 1),
    F.linear: ("Linear", 0),
}

# What may stand between a layer and its feature map: normalisation, activation functions, residual adds.
_PASSING_NAMES = frozenset(
    "batch_norm instance_norm group_norm layer_norm relu relu_ relu6 hardtanh hardtanh_ hardswish hardsigmoid silu "
    "gelu elu elu_ leaky_relu leaky_relu_ prelu mish selu celu sigmoid sigmoid_ tanh tanh_ softplus clamp clamp_ "
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout contiguous to clone detach".split()
)
_ADD_NAMES = frozenset(("add", "add_", "__add__", "__iadd__", "__radd__"))
# x * sigmoid(x), written out, is one activation function too.
_GATE_NAMES = frozenset(("sigmoid", "hardsigmoid"))
_PRODUCT_NAMES = frozenset(("mul", "mul_", "__mul__", "__imul__", "__rmul__", "multiply"))
# Reading a shape or a flag is not a use of the values.
METADATA_NAMES = frozenset("size dim numel __get__ __len__ stride is_contiguous requires_grad_ data_ptr storage_offset".split())


def function_name(function: Callable[..., Any]) -> str:
    """The bare name a torch function is known by."""
    return getattr(function, "__name__", str(function))


def weight_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The weight of a convolution or linear call."""
    return args[1] if len(args) > 1 else kwargs.get("weight")


def input_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The activation of a convolution or linear call."""
    return args[0] if args else kwargs.get("input")


def bias_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The bias of a convolution or linear call, None without one."""
    return args[2] if len(args) > 2 else kwargs.get("bias")


def parameter_names(model: nn.Module) -> dict[int, str]:
    """`id(parameter)` -> its first name in the state dict."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


@contextlib.contextmanager
def running(modules: Iterable[nn.Module]) -> Iterator[list[nn.Module]]:
    """Those of `modules` that run at the moment, the innermost last; known by hooks, which go at the end."""
    stack: list[nn.Module] = []

    def leave(*_: Any) -> None:
        stack.pop()

    with contextlib.ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(lambda module, _inputs: stack.append(module)).remove)
            hooks.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield stack


@final
class LayerOfCall:
    """Tells the layer of a weighted call: by the parameter that it reads, else by the module that is running.

    Use as a context around forward passes; layers whose weight is computed before each call need its hooks.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer]) -> None:
        parameters = dict(model.named_parameters())
        modules = dict(model.named_modules())
        self._by_parameter: dict[int, str] = {}
        self._by_module: dict[nn.Module, str] = {}
        for layer in layers:
            if layer.weight_name in parameters:
                self._by_parameter[id(parameters[layer.weight_name])] = layer.name
            else:  # The weight is computed from others before each call: only its module is there to know it by.
                self._by_module[modules[layer.name]] = layer.name
        self._running: list[nn.Module] = []
        self._hooks = contextlib.ExitStack()

    def __enter__(self) -> LayerOfCall:
        self._running = self._hooks.enter_context(running(self._by_module))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hooks.close()

    def name(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Name of the layer that a convolution or linear call with these arguments computes; None for another's."""
        layer = self._by_parameter.get(id(weight_argument(args, kwargs)))
        if layer is None and self._running:
            layer = self._by_module[self._running[-1]]
        return layer


class AbstractWatch(TorchFunctionMode, abc.ABC):
    """Calls `on_weighted` for every weighted operation and `on_other` for every other torch function."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in WEIGHTED:
            self.before_weighted(func, args, kwargs)
            output = func(*args, **kwargs)
            self.on_weighted(func, args, kwargs, output)
            return output
        self.before_other(func, args, kwargs)
        output = func(*args, **kwargs)
        self.on_other(func, args, kwargs, output)
        return output

    def before_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Called before a convolution or linear operation runs."""

    def before_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Called before any other torch function runs."""

    @abc.abstractmethod
    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """Called after a convolution or linear operation ran."""

    def on_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Called after any other torch function ran."""


@dataclass(frozen=True)
class _Open:
    """A tensor that may still become the feature map of some layers; holding it keeps its id unique."""

    tensor: Tensor
    layers: tuple[str, ...]
    gated: Tensor | None = None  # what a sigmoid was taken of: their product is one activation function


@final
class FeatureWatch(AbstractWatch):
    """Hands over the feature map of every layer the moment it is final, then lets go of it.

    The feature map of a layer is its output after the normalisation, activation and residual add that follow, up to
    the first operation that reads it for anything else: OMPQ's and CSMPQ's "after ReLU; at a residual block's
    end, the block output after the add". Layers that end in the same add share one feature map. Where a block starts with
    normalisation (pre-activation), that belongs to the feature map of the block before.

    `on_feature(layers, feature)` receives the names and a tensor [N, ...]. A layer called several times hands over
    the feature map of each call. Use as a context around one forward pass; the outputs are handed over at its end.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[Layer], on_feature: Callable[[tuple[str, ...], Tensor], None]
    ) -> None:
        super().__init__()
        self._on_feature = on_feature
        self._open: dict[int, _Open] = {}  # by id of the tensor
        self._owner = LayerOfCall(model, layers)

    def __enter__(self) -> FeatureWatch:
        self._owner.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own has no types
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._owner.__exit__(*exception)
        if exception[0] is None:
            for held in tuple(self._open.values()):  # What nothing read: the outputs of the model.
                self._close(held.tensor)
        self._open.clear()

    def before_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Close the feature map that is read."""
        self._close(input_argument(args, kwargs))

    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        """Open the feature map of the layer."""
        layer = self._owner.name(args, kwargs)
        if layer is not None:
            self._open[id(output)] = _Open(output, (layer,))

    def before_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Close feature maps that are read by anything that does not pass them on."""
        name = function_name(function)
        if name in METADATA_NAMES or self._passing_on(name, args, kwargs):
            return
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                self._close(item)

    def on_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Pass the feature map on."""
        name = function_name(function)
        if not isinstance(output, Tensor):
            return
        sources = self._passing_on(name, args, kwargs)
        ends = [self._open.pop(id(source)) for source in sources if id(source) in self._open]
        layers = tuple(dict.fromkeys(layer for end in ends for layer in end.layers))
        if layers:
            self._open[id(output)] = _Open(output, layers, sources[0] if name in _GATE_NAMES else None)

    def _passing_on(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The arguments whose feature map goes on in the result; none for an operation that ends feature maps."""
        if name in _ADD_NAMES:
            # Nothing is read twice: x + x has one source.
            return list({id(value): value for value in (*args[:2], *kwargs.values()) if isinstance(value, Tensor)}.values())
        if name in _PASSING_NAMES:
            source = input_argument(args, kwargs)
            return [source] if isinstance(source, Tensor) else []
        if name in _PRODUCT_NAMES:
            return [value for value in args[:2] if self._is_gate_of_another(value, args)]
        return []

    def _is_gate_of_another(self, value: Any, args: Sequence[Any]) -> bool:
        held = self._open.get(id(value))
        return held is not None and held.gated is not None and any(other is held.gated for other in args[:2])

    def _close(self, tensor: Any) -> None:
        held = self._open.pop(id(tensor), None) if isinstance(tensor, Tensor) else None
        if held is not None:
            self._on_feature(held.layers, held.tensor)
