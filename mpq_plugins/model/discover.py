"""Layer discovery: one watched forward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    function_name,
    input_argument,
    parameter_names,
    weight_argument,
)

LAYER_TYPES = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_UNSUPPORTED = (nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


@dataclass
class _Seen:
    """What the calls of one weight have shown so far."""

    name: str
    weight_name: str
    kind: str
    weight: Tensor
    bias: Tensor | None
    channel_axis: int
    groups: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    functional: bool
    n_norm_parameters: int = 0
    n_calls: int = 0
    total_macs: int = 0  # over the whole batch


@final
class _DiscoveryWatch(AbstractWatch):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: dict[str, _Seen] = {}
        self.computed_weights: dict[str, int] = {}  # operation -> MACs over the whole batch
        self.readers = Readers(model)
        self._parameters = parameter_names(model)
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        self._producer: dict[int, tuple[Tensor, _Seen]] = {}

    def enter(self, module: nn.Module, _inputs: Any) -> None:
        self._running.append(module)

    def leave(self, module: nn.Module, _inputs: Any, _output: Any) -> None:
        self._running.pop()

    def on_weighted(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> None:
        kind, channel_axis = WEIGHTED[function]
        weight, activation = weight_argument(args, kwargs), input_argument(args, kwargs)
        weight_name = self._parameters.get(id(weight))
        owner = self._running[-1] if self._running else None
        if owner is not None and weight_name is not None and _has_another_weight(owner, weight):
            owner = None  # a further parameter of the module, such as a low-rank addition
        if owner is not None:
            name = self._modules[id(owner)]
            weight_name = weight_name or f"{name}.weight".lstrip(".")
        elif weight_name is not None:
            name = weight_name.removesuffix(".weight") if weight_name.endswith(".weight") else weight_name
        else:
            self._note_computed(function_name(function), weight, _macs(kind, weight, activation, output))
            return
        name = name or "weight"
        seen = self.seen.get(name)
        if seen is None:
            seen = self.seen[name] = _Seen(
                name=name,
                weight_name=weight_name,
                kind=kind,
                weight=weight,
                bias=args[2] if len(args) > 2 else kwargs.get("bias"),
                channel_axis=channel_axis,
                groups=_groups(kind, weight, activation),
                input_shape=tuple(activation.shape),
                output_shape=tuple(output.shape),
                functional=owner is None,
            )
        seen.n_calls += 1
        seen.total_macs += _macs(kind, weight, activation, output)
        self._producer[id(output)] = (output, seen)

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
        source = args[0] if args else kwargs.get("input")
        _, seen = self._producer.get(id(source), (None, None))
        weight = args[3] if len(args) > 3 else kwargs.get("weight")
        if seen is not None and weight is not None:
            seen.n_norm_parameters = 2 * weight.numel()


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
    handles = []
    for module in model.modules():
        if isinstance(module, LAYER_TYPES):
            handles.append(module.register_forward_pre_hook(watch.enter))
            handles.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        with evaluating(model), watch:
            call(model, example)
    except MPQError:
        raise
    except Exception as error:
        raise ModelError(
            f"the forward pass of {type(model).__name__} failed on the example: {type(error).__name__}: {error}. "
            "Give an example as the model's forward takes it: a tensor, a tuple, or a dict of keyword arguments."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    n_images = batch_size(example)
    layers = _layers(watch, model, n_images)
    return layers, _skipped(watch, model, layers, n_images)


def _layers(watch: _DiscoveryWatch, model: nn.Module, n_images: int) -> tuple[Layer, ...]:
    names_of: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names_of.setdefault(id(module), []).append(name)
    aliases = {names[0]: tuple(names[1:]) for names in names_of.values()}
    first_holder: dict[str, str] = {}
    layers = []
    for seen in watch.seen.values():
        holder = first_holder.setdefault(seen.weight_name, seen.name)
        weight_shape = tuple(seen.weight.shape)
        groups = _module_groups(model, seen) or seen.groups
        n_channels = weight_shape[seen.channel_axis] * (groups if seen.channel_axis == 1 else 1)
        layers.append(
            Layer(
                name=seen.name,
                kind=seen.kind,
                weight_name=seen.weight_name,
                weight_shape=weight_shape,
                n_weights=seen.weight.numel(),
                n_biases=0 if seen.bias is None else seen.bias.numel(),
                n_norm_parameters=seen.n_norm_parameters,
                out_channels=n_channels,
                groups=groups,
                macs=-(-seen.total_macs // n_images),
                n_calls=seen.n_calls,
                input_shape=seen.input_shape[1:],
                output_shape=seen.output_shape[1:],
                n_input_elements=math.prod(seen.input_shape[1:]),
                n_output_elements=math.prod(seen.output_shape[1:]),
                functional=seen.functional,
                aliases=aliases.get(seen.name, ()),
                shares_weight_with=None if holder == seen.name else holder,
            )
        )
    return tuple(layers)


def _module_groups(model: nn.Module, seen: _Seen) -> int | None:
    # The group count of a transposed convolution does not follow from its shapes.
    modules = dict(model.named_modules())
    groups = getattr(modules.get(seen.name), "groups", None)
    return groups if isinstance(groups, int) else None


def _skipped(watch: _DiscoveryWatch, model: nn.Module, layers: tuple[Layer, ...], n_images: int) -> tuple[Skipped, ...]:
    return _Account(watch, model, layers, n_images).entries()


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
        found: list[Skipped] = []
        for name, module in self._model.named_modules():
            found += self._of_module(name, module)
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
            told = f"{reason}; {_joined(operations)} reads its weight" if operations else reason
            return [self._entry(label, told, own)]
        if isinstance(module, _UNSUPPORTED):
            return [self._entry(label, f"{kind} is not a searched kind of layer; stays in float", own)]
        if not own:
            return []
        if len(own) == 1 and own[0] is module._parameters.get("weight"):
            return [self._entry(label, f"{kind}: {self._told(operations)}", own)]
        return [
            self._entry(
                self._left[id(parameter)], f"a parameter of {kind}: {self._told(self._operations(parameter))}", [parameter]
            )
            for parameter in own
        ]

    def _operations(self, parameter: nn.Parameter) -> list[str]:
        return self._watch.readers.operations.get(self._left[id(parameter)], [])

    @staticmethod
    def _told(operations: list[str]) -> str:
        if not operations:
            return "no operation of this example's forward pass reads it as it is"
        return f"read by {_joined(operations)}, which is no convolution or linear call on a parameter; stays in float"

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


def _joined(words: Sequence[str]) -> str:
    return ", ".join(words)
