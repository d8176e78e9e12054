"""Layer discovery: one watched forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final

from torch import Tensor, nn

from mpq_plugins.errors import ModelError, MPQError
from mpq_plugins.model.check import plain_model
from mpq_plugins.model.layers import EXCLUDED, Inventory, Layer, Skipped, fingerprint, matching, patterns_of, skipped_layers
from mpq_plugins.model.readers import Readers
from mpq_plugins.model.run import batch_size, call, evaluating
from mpq_plugins.model.watch import (
    WEIGHTED,
    AbstractWatch,
    bias_argument,
    function_name,
    input_argument,
    parameter_names,
    running,
    weight_argument,
)

LAYER_TYPES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_UNSUPPORTED = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


@final
class _DiscoveryWatch(AbstractWatch):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: dict[str, Layer] = {}  # `macs` over the whole batch
        self.computed_weights: dict[str, int] = {}  # operation -> MACs over the whole batch
        self.readers = Readers(model)
        self._parameters = parameter_names(model)
        self._names: dict[nn.Module, list[str]] = {}  # all of each module, the first one first
        for name, module in model.named_modules(remove_duplicate=False):
            self._names.setdefault(module, []).append(name)
        self._modules = dict(model.named_modules())
        self._first_holder: dict[str, str] = {}  # weight -> the first layer that reads it
        self.running: list[nn.Module] = []  # layers, the innermost last
        self._producer: dict[int, tuple[Tensor, str]] = {}  # the layer of each output; holding that keeps its id unique

    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        kind, channel_axis = WEIGHTED[function]
        weight, activation = weight_argument(args, kwargs), input_argument(args, kwargs)
        weight_name = self._parameters.get(id(weight))
        owner = self.running[-1] if self.running else None
        if owner is not None and weight_name is not None and _has_another_weight(owner, weight):
            owner = None  # a further parameter of the module, such as a low-rank addition
        macs = _macs(kind, weight, activation, output)
        if owner is not None:
            name = self._names[owner][0]
            weight_name = weight_name or f"{name}.weight".lstrip(".")
        elif weight_name is not None:
            name = weight_name.removesuffix(".weight")
        else:
            self._note_computed(function_name(function), weight, macs)
            return
        name = name or "weight"
        if name not in self.seen:
            bias = bias_argument(args, kwargs)
            # The group count of a transposed convolution does not follow from its shapes.
            module = self._modules.get(name)
            groups = getattr(module, "groups", None)
            groups = groups if isinstance(groups, int) and groups else _groups(kind, weight, activation)
            holder = self._first_holder.setdefault(weight_name, name)
            self.seen[name] = Layer(
                name=name,
                kind=kind,
                weight_name=weight_name,
                weight_shape=tuple(weight.shape),
                n_weights=weight.numel(),
                n_biases=0 if bias is None else bias.numel(),
                n_norm_parameters=0,
                out_channels=weight.shape[channel_axis] * (groups if channel_axis == 1 else 1),
                groups=groups,
                macs=0,
                n_calls=0,
                input_shape=tuple(activation.shape[1:]),
                output_shape=tuple(output.shape[1:]),
                n_input_elements=math.prod(activation.shape[1:]),
                n_output_elements=math.prod(output.shape[1:]),
                functional=owner is None,
                aliases=() if module is None else tuple(self._names[module][1:]),
                shares_weight_with=None if holder == name else holder,
            )
        layer = self.seen[name]
        self.seen[name] = replace(layer, n_calls=layer.n_calls + 1, macs=layer.macs + macs)
        self._producer[id(output)] = (output, name)

    def _note_computed(self, operation: str, weight: Tensor, macs: int) -> None:
        origins = self.readers.origins(weight)
        if not origins:
            self.computed_weights[operation] = self.computed_weights.get(operation, 0) + macs
        for index, name in enumerate(origins):  # the call counts once, however many parameters its weight is made of
            self.readers.read(name, f"{operation} of a computed weight", 0 if index else macs)

    def on_other(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        self.readers.on_call(function, args, kwargs, output)
        if function_name(function) != "batch_norm":
            return
        _, name = self._producer.get(id(input_argument(args, kwargs)), (None, None))
        weight = args[3] if len(args) > 3 else kwargs.get("weight")
        if name is not None and weight is not None:
            self.seen[name] = replace(self.seen[name], n_norm_parameters=2 * weight.numel())


def _has_another_weight(module: nn.Module, weight: Tensor) -> bool:
    own = module._parameters.get("weight")
    return own is not None and own is not weight


def _macs(kind: str, weight: Tensor, activation: Tensor, output: Tensor) -> int:
    # Each weight of a convolution is used once per output position (per input position when it is transposed).
    if kind == "Linear":
        return output.numel() * weight.shape[1]
    if kind.startswith("ConvTranspose"):
        return activation.numel() * (weight.numel() // weight.shape[0])
    return output.numel() * (weight.numel() // weight.shape[0])


def _groups(kind: str, weight: Tensor, activation: Tensor) -> int:
    if kind == "Linear":
        return 1
    n_spatial = weight.dim() - 2
    channels = activation.shape[-1 - n_spatial]
    return 1 if kind.startswith("ConvTranspose") else channels // weight.shape[1]


def find_layers(
    model: nn.Module, example: Any, *, include: str | Sequence[str] = ("*",), exclude: str | Sequence[str] = ()
) -> Inventory:
    """List the convolution, transposed convolution and linear layers that a forward pass of `example` calls.

    Args:
        model: a torch model; it stays as it is.
        example: a tensor, a tuple of positional or a dict of keyword arguments, the first axis the batch.
        include, exclude: glob patterns over layer names, one or several.

    Raises `ModelError` when the forward pass fails or calls no such layer, `UnknownLayerError` for a pattern without a match.

    Example:
        >>> inventory = mpq.find_layers(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 8, 8))
        >>> [(layer.name, layer.weight_shape, layer.macs) for layer in inventory]
        [('0', (8, 3, 3, 3), 7776)]
    """
    layers, skipped = discover(model, example)
    names = [layer.name for layer in layers]
    if not names:
        raise ModelError(
            f"{type(model).__name__} calls no Conv, ConvTranspose or Linear layer on this example, so there is nothing "
            "to allocate bits to. Give an example that reaches them."
        )
    kept = {name for pattern in patterns_of(include) for name in matching(pattern, names)}
    dropped = {name for pattern in patterns_of(exclude) for name in matching(pattern, names)}
    excluded = skipped_layers(layers, {name: EXCLUDED for name in names if name not in kept - dropped})
    return Inventory(
        layers=tuple(layer for layer in layers if layer.name in kept - dropped),
        skipped=(*skipped, *excluded),
        fingerprint=fingerprint({layer.name: layer.weight_shape for layer in layers}),
    )


def discover(model: nn.Module, example: Any) -> tuple[tuple[Layer, ...], tuple[Skipped, ...]]:
    """Run `example` once and report the weighted layers it called, in order, and what was skipped."""
    model = plain_model(model, with_values=False)
    watch = _DiscoveryWatch(model)
    modules = [module for module in model.modules() if isinstance(module, LAYER_TYPES)]
    try:
        with running(modules) as watch.running, evaluating(model), watch:
            call(model, example)
    except MPQError:
        raise
    except Exception as error:
        raise ModelError(
            f"the forward pass of {type(model).__name__} failed on the example: {type(error).__name__}: {error}. "
            "Give an example as the model's forward takes it: a tensor, a tuple, or a dict of keyword arguments."
        ) from error
    n_images = batch_size(example)
    layers = tuple(replace(layer, macs=-(-layer.macs // n_images)) for layer in watch.seen.values())
    return layers, _Account(watch, model, layers, n_images).entries()


class _Account:
    """Lists what stays in float, and counts every parameter of two or more dimensions that no layer holds exactly once."""

    def __init__(self, watch: _DiscoveryWatch, model: nn.Module, layers: tuple[Layer, ...], n_images: int) -> None:
        self._watch, self._model, self._n_images = watch, model, n_images
        self._called = {layer.name for layer in layers}
        weights, modules = {layer.weight_name for layer in layers}, dict(model.named_modules())
        self._left = {
            id(parameter): name for name, parameter in model.named_parameters() if parameter.dim() > 1 and name not in weights
        }
        for layer in layers:
            if layer.name in modules:
                for parameter in _parametrized_from(modules[layer.name]):  # the layer's weight is computed from them
                    self._left.pop(id(parameter), None)

    def entries(self) -> tuple[Skipped, ...]:
        found = [entry for name, module in self._model.named_modules() for entry in self._of_module(name, module)]
        for operation, macs in sorted(self._watch.computed_weights.items()):
            reason = "its weight is computed in the forward pass, not a parameter, so it has no place for bits"
            found.append(Skipped(operation, reason, macs=-(-macs // self._n_images)))
        return tuple(found)

    def _of_module(self, name: str, module: nn.Module) -> list[Skipped]:
        label, kind = name or type(module).__name__, type(module).__name__
        own = [parameter for parameter in _own_parameters(module) if id(parameter) in self._left]
        operations = list(dict.fromkeys(word for parameter in own for word in self._operations(parameter)))
        if isinstance(module, LAYER_TYPES) and (name or "weight") not in self._called:
            reason = "not called as a module in the forward pass of this example"
            told = f"{reason}; {', '.join(operations)} reads its weight" if operations else reason
            return [self._entry(label, told, own)]
        if isinstance(module, _UNSUPPORTED):
            return [self._entry(label, f"{kind} is not a searched kind of layer; stays in float", own)]
        if not own:
            return []
        if len(own) == 1 and own[0] is module._parameters.get("weight"):
            return [self._entry(label, f"{kind}: {self._told(operations)}", own)]
        reasons = [f"a parameter of {kind}: {self._told(self._operations(one))}" for one in own]
        return [self._entry(self._left[id(one)], why, [one]) for one, why in zip(own, reasons, strict=True)]

    def _operations(self, parameter: nn.Parameter) -> list[str]:
        return self._watch.readers.operations.get(self._left[id(parameter)], [])

    @staticmethod
    def _told(operations: list[str]) -> str:
        if not operations:
            return "no operation of this example's forward pass reads it as it is"
        return f"read by {', '.join(operations)}, which is no convolution or linear call on a parameter; stays in float"

    def _entry(self, name: str, reason: str, parameters: list[nn.Parameter]) -> Skipped:
        names = [self._left.pop(id(parameter)) for parameter in parameters]
        macs = sum(self._watch.readers.macs.get(item, 0) for item in names)
        return Skipped(name, reason, sum(parameter.numel() for parameter in parameters), -(-macs // self._n_images))


def _own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that stand in the module itself or behind its parametrizations, each once."""
    direct = [parameter for parameter in module._parameters.values() if parameter is not None]
    return list({id(parameter): parameter for parameter in (*direct, *_parametrized_from(module))}.values())


def _parametrized_from(module: nn.Module) -> list[nn.Parameter]:
    held = module._modules.get("parametrizations")
    return [] if held is None else list(held.parameters())
