"""Watching a forward pass: which weighted operation runs, on what, and where its feature map ends.

Operations are told apart by the *parameter* they read, not by module class or scope, so modules called twice,
functional calls and tied weights all resolve. No graph is traced, hence any Python control flow is fine.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout contiguous to clone".split()
)
_ADD_NAMES = frozenset(("add", "add_", "__add__", "__iadd__", "__radd__"))
# Reading a shape or a flag is not a use of the values.
_METADATA_NAMES = frozenset(
    "size dim numel __get__ __len__ stride is_contiguous requires_grad_ detach data_ptr storage_offset".split()
)


def function_name(function: Callable[..., Any]) -> str:
    """The bare name a torch function is known by."""
    return getattr(function, "__name__", str(function))


def weight_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The weight of a convolution or linear call."""
    return args[1] if len(args) > 1 else kwargs.get("weight")


def input_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The activation of a convolution or linear call."""
    return args[0] if args else kwargs.get("input")


def parameter_names(model: nn.Module) -> dict[int, str]:
    """`id(parameter)` -> its first name in the state dict."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


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


@final
class FeatureWatch(AbstractWatch):
    """Hands over the feature map of every layer the moment it is final, then lets go of it.

    The feature map of a layer is its output after the normalisation, activation and residual add that follow, up to
    the first operation that reads it for anything else: OMPQ's and CSMPQ's "after ReLU; at a residual block's
    end, the block output after the add". Layers that end in the same add share one feature map.

    `on_feature(layers, feature)` receives the names and a tensor [N, ...]. A layer called several times hands over
    the feature map of each call.
    """

    def __init__(self, layer_of_parameter: Mapping[int, str], on_feature: Callable[[tuple[str, ...], Tensor], None]) -> None:
        super().__init__()
        self._layer_of_parameter = layer_of_parameter
        self._on_feature = on_feature
        # id(tensor) -> (tensor, layers whose feature map it may still become). Holding the tensor keeps the id unique.
        self._open: dict[int, tuple[Tensor, tuple[str, ...]]] = {}

    def before_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._close(input_argument(args, kwargs))

    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        layer = self._layer_of_parameter.get(id(weight_argument(args, kwargs)))
        if layer is not None:
            self._open[id(output)] = (output, (layer,))

    def before_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        name = function_name(function)
        if name in _PASSING_NAMES or name in _ADD_NAMES or name in _METADATA_NAMES:
            return
        for value in (*args, *kwargs.values()):
            for item in value if isinstance(value, (tuple, list)) else (value,):
                self._close(item)

    def on_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        name = function_name(function)
        if not isinstance(output, Tensor) or not (name in _PASSING_NAMES or name in _ADD_NAMES):
            return
        sources = args[:2] if name in _ADD_NAMES else args[:1] or (kwargs.get("input"),)
        layers: tuple[str, ...] = ()
        for source in sources:
            _, ending = self._open.pop(id(source), (None, ())) if isinstance(source, Tensor) else (None, ())
            layers += tuple(layer for layer in ending if layer not in layers)
        if layers:
            self._open[id(output)] = (output, layers)

    def finish(self) -> None:
        """Hand over what nothing read: the outputs of the model."""
        for tensor, _ in tuple(self._open.values()):
            self._close(tensor)

    def _close(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor):
            return
        _, layers = self._open.pop(id(tensor), (None, ()))
        if layers:
            self._on_feature(layers, tensor)
