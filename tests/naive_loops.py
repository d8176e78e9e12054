"""Judges of the sensitivity engine: quantized copies of a model, run whole, and double loops over them."""

import copy
import functools
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from mpq_plugins.model.run import call, select
from mpq_plugins.quantizers.uniform import mse_range, mse_scale


class NaiveLoop:
    """Whole forward passes of deep copies of `model`, in which some units of `space` are quantized.

    Activations are quantized too where the space has several activation bits, with the ranges of `batches[0]`. With
    `correction` the copies are corrected by `corrected_copy` on the very batch that they then run.
    """

    def __init__(self, model, space, batches, *, per_channel=True, output=None, correction=False):
        self.model = copy.deepcopy(model).eval()
        self.space, self.batches, self.per_channel, self.output = space, batches, per_channel, output
        self.n_forwards, self.correction = 0, correction
        self.options = [(unit, choice) for unit, own in enumerate(space.units) for choice in range(len(own.choices))]
        self._pinned = [(unit, 0) for unit, own in enumerate(space.units) if len(own.choices) == 1]
        self._inputs = self._layer_inputs() if space.searches_activations else {}

    def logits(self, *changes, inputs=None):
        """Outputs with every (unit, choice) of `changes` quantized, and the units with one choice; on all batches."""
        changed = self._copy((*self._pinned, *changes))
        batches = [inputs for inputs, _ in self.batches] if inputs is None else [inputs]
        self.n_forwards += len(batches)
        with torch.no_grad():
            if self.correction:
                copies = [(corrected_copy(self.model, changed, inputs), inputs) for inputs in batches]
            else:
                copies = [(changed, inputs) for inputs in batches]
            return torch.cat([select(call(copied, inputs), self.output) for copied, inputs in copies])

    def single_losses(self, criterion):
        """Changes of a criterion of the outputs with one unit changed [option]."""
        base = criterion(self.logits())
        return np.array([criterion(self.logits(option)) - base for option in self.options])

    def losses(self, criterion):
        """Changes of a criterion of the outputs: one unit changed [option], and Omega [option, option]."""
        base = criterion(self.logits())
        single = self.single_losses(criterion)
        omega = np.zeros((len(single), len(single)))
        for (i, one), (j, other) in itertools.combinations(enumerate(self.options), 2):
            free = all(len(self.space.units[unit].choices) > 1 for unit, _ in (one, other))
            if one[0] != other[0] and free:
                omega[i, j] = omega[j, i] = criterion(self.logits(one, other)) - base - single[i] - single[j]
        return single, omega

    @functools.cache  # noqa: B019 -- judges live as long as their test
    def weight(self, layer, bits):
        """The quantized weight of a layer, from its definition."""
        facts = self.space.layer(layer)
        axis = (1 if facts.kind.startswith("ConvTranspose") else 0) if self.per_channel else None
        weight = _weight_of(self.model, facts)
        scale = mse_scale(weight, bits, channel_axis=axis)
        return torch.clamp(torch.round(weight / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale

    @functools.cache  # noqa: B019
    def activation(self, layer, bits):
        """A function that quantizes what a layer reads."""
        values = self._inputs[layer]
        signed = bool(values.min() < 0)
        scale = mse_range(values, [bits], signed=signed)[bits].item()
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return lambda x: torch.clamp(torch.round(x / scale), low, high) * scale

    def _copy(self, changes):
        changed = _copy_of(self.model)
        for unit, choice in changes:
            precision = self.space.units[unit].choices[choice]
            for layer in self.space.units[unit].layers:
                _set_weight(changed, self.space.layer(layer), self.weight(layer, precision.weight))
                if self._inputs:
                    quantizer = self.activation(layer, precision.activation)
                    changed.get_submodule(layer).register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]),))
        return changed

    def _layer_inputs(self):
        found, probe = {}, copy.deepcopy(self.model)
        for layer in self.space.layers:
            probe.get_submodule(layer.name).register_forward_pre_hook(
                lambda _, args, name=layer.name: found.__setitem__(name, args[0])
            )
        with torch.no_grad():
            call(probe, self.batches[0][0])
        return found


def corrected_copy(model, quantized, inputs):
    """A copy of `quantized` with its statistics and biases moved by what sets it apart from `model` on `inputs`.

    In the order of the forward pass: of every batch normalisation the mean by the difference of the means of what it reads,
    the variance by the ratio of the variances (0.1 to 10); of other layers with a bias and one row per image, the bias by the
    mean difference.
    Every module is called once.
    """
    of_float, normed, handles = {}, set(), []
    names = {module: name for name, module in model.named_modules()}
    outputs = {}

    def keep_input(module, args):
        normed.update(name for name, output in outputs.items() if output is args[0])
        of_float[names[module]] = args[0].clone()

    def keep_output(module, _args, output):
        outputs[names[module]] = output
        of_float[names[module]] = output.clone()

    for module in model.modules():
        if is_norm(module):
            handles.append(module.register_forward_pre_hook(keep_input))
        elif has_bias(module):
            handles.append(module.register_forward_hook(keep_output))
    call(model, inputs)
    for handle in handles:
        handle.remove()

    changed = copy.deepcopy(quantized)
    handles = []
    for name, module in changed.named_modules():
        if name in of_float and is_norm(module):
            handles.append(module.register_forward_pre_hook(functools.partial(_move_statistics, of_float[name])))
        elif name in of_float and name not in normed:
            handles.append(module.register_forward_hook(functools.partial(_move_bias, of_float[name])))
    call(changed, inputs)
    for handle in handles:
        handle.remove()
    return changed


def is_norm(module):
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def has_bias(module):
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module.bias is not None


def _move_statistics(of_float, norm, args):
    axes = [axis for axis in range(of_float.dim()) if axis != 1]
    ratio = args[0].var(axes, correction=0) / of_float.var(axes, correction=0)
    norm.running_mean += args[0].mean(axes) - of_float.mean(axes)
    norm.running_var *= torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0).clamp(0.1, 10)


def _move_bias(of_float, layer, _args, output):
    if isinstance(layer, nn.Linear) and output.dim() > 2:  # a row per token: see `is_of_tokens`
        return
    channel = 1 if isinstance(layer, nn.modules.conv._ConvNd) else output.dim() - 1
    axes = [axis for axis in range(output.dim()) if axis != channel]
    moved = of_float.mean(axes) - output.mean(axes)
    layer.bias = nn.Parameter(layer.bias + moved)
    return output + moved.reshape(-1, *[1] * (output.dim() - 1 - channel))


def cross_entropy(batches):
    """The mean cross-entropy of outputs [N, class] on the labels of batches."""
    labels = torch.cat([labels for _, labels in batches])
    return lambda logits: F.cross_entropy(logits.double(), labels).item()


def kl_from(base):
    """The mean KL divergence of outputs [N, class] from `base`."""
    p = base.double().softmax(1)
    return lambda logits: (p * (p.log() - logits.double().log_softmax(1))).sum(1).mean().item()


def _weight_of(model, facts):
    module = model.get_submodule(facts.name) if not facts.functional else None
    weight = model.get_parameter(facts.weight_name) if module is None else module.weight
    return weight.detach()


def _copy_of(model):
    """A copy of the modules, and of the tensors too where setting a weight would write into them."""
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        return copy.deepcopy(model)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _set_weight(model, facts, value):
    path = facts.weight_name if facts.functional else f"{facts.name}.weight"
    owner, _, leaf = path.rpartition(".")
    module = model.get_submodule(owner)
    # A parametrized weight is set through the parametrization's inverse.
    setattr(module, leaf, value if parametrize.is_parametrized(module) else nn.Parameter(value))


def with_statistics(model, images):
    """`model` in evaluation mode, its batch normalisations with the statistics of a batch and uneven scales."""
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the average of what it sees
        if norm.affine:
            norm.weight.data.copy_(0.5 + torch.rand(norm.weight.shape, generator=generator))
            norm.bias.data.copy_(0.3 * torch.randn(norm.bias.shape, generator=generator))
    with torch.no_grad():
        call(model.train(), images)
    return model.eval()
