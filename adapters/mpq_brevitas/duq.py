"""DuQ as a Brevitas quantizer, and the ordinary Brevitas quantizers that it is equivalent to.

DuQ clips inputs at a and gives c at the largest code q. An exported quantizer has one scale for both: QONNX' Quant and ONNX'
QuantizeLinear divide and multiply by the same number. `fold_duq` writes a trained layer so that one scale is enough:

    conv(c_x/q_x X, c_w/q_w W) = conv(a_x/q_x X, c_w/q_w c_x/a_x W)        X, W the integer codes

The input's quantizer keeps its clip a_x as its only scale; what its output scale had besides moves into the weight's, whose
stored values become codes times scale. Codes, outputs, biases and zero padding are what they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpq_brevitas import internals as brevitas
from mpq_brevitas.options import BrevitasOptions
from mpq_plugins.quantizers.duq import DuQ, activation_range, n_levels, weight_range


class _View(nn.Module):
    """What Brevitas asks a quantizer for its layout: as it is, because DuQ has one scale per tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.input_view_impl = nn.Identity()


class DuQTensorQuant(nn.Module):
    """DuQ as Brevitas calls it: x to (quantized x, scale c / q, zero point 0, bit-width).

    Weights start from their values; activations collect ranges while Brevitas calibrates, and start from their mean.
    """

    def __init__(
        self, bit_width: int, bit_width_impl: nn.Module, signed: bool, tracked_parameter_list: list[Tensor] | None = None
    ) -> None:
        super().__init__()
        self.msb_clamp_bit_width_impl = bit_width_impl
        self.duq = DuQ(bit_width, signed=signed)
        self.register_buffer("zero_point", torch.tensor(0.0), persistent=False)
        self.int_quant = _View()
        self.observer_only = False  # Brevitas' calibration turns it on
        self._ranges: list[Tensor] = []
        # Brevitas first makes a layer without values, and its quantizers again once the weights are in.
        weights = [weight for weight in tracked_parameter_list or () if not weight.is_meta]
        if weights:
            self.to(weights[0].device)
            self.duq.set_range(torch.stack([weight_range(weight) for weight in weights]).max())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See the class."""
        bit_width = self.msb_clamp_bit_width_impl()
        self.duq.bits = int(bit_width)  # may have been switched in place
        if self.observer_only:
            self._ranges.append(activation_range(x, signed=self.duq.signed))
        scale = self.duq.c / n_levels(self.duq.bits, signed=self.duq.signed)
        return x if self.observer_only else self.duq(x), scale, self.zero_point, bit_width

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if brevitas.config.IGNORE_MISSING_KEYS:  # a float model's state, which Brevitas fills quantized layers with
            for name, parameter in self.duq.named_parameters():
                state_dict.setdefault(f"{prefix}duq.{name}", parameter)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def init_scale(self) -> None:
        """Called by Brevitas when calibration ends."""
        if self._ranges:
            self.duq.set_range(torch.stack(self._ranges).mean())
            self._ranges.clear()


class DuQWeight(brevitas.WeightQuantSolver):
    """A weight quantized by DuQ, one pair of scales per tensor (PROFIT, Park and Yoo 2020, section 4)."""

    tensor_quant = DuQTensorQuant
    signed = True
    narrow_range = True
    bit_width = 8
    bit_width_impl_type = "stateful_const"


class DuQActivation(brevitas.ActQuantSolver):
    """An activation quantized by DuQ, one pair of scales per tensor."""

    tensor_quant = DuQTensorQuant
    signed = True
    narrow_range = True
    bit_width = 8
    bit_width_impl_type = "stateful_const"
    tracked_parameter_list = None


def weight_quantizer(bits: int, options: BrevitasOptions) -> Any:
    """The quantizer class of a weight of so many bits."""
    if options.quantizer == "duq":
        return DuQWeight.let(bit_width=int(bits))
    return brevitas.weight_quantizer(
        bits,
        options.weight_range,
        power_of_two=options.scales == "power-of-two",
        learned=options.weight_scale == "learned",
    )


def activation_quantizer(bits: int, options: BrevitasOptions, *, signed: bool) -> Any:
    """The quantizer class of an activation of so many bits."""
    if options.quantizer == "duq":
        return DuQActivation.let(bit_width=int(bits), signed=signed, narrow_range=signed)
    return brevitas.activation_quantizer(bits, signed=signed, power_of_two=options.scales == "power-of-two")


def fold_duq(module: nn.Module) -> nn.Module:
    """Replace DuQ in every layer by ordinary quantizers of one scale, in place; returns the module, ready to be exported."""
    with brevitas.guarded():
        for layer in module.modules():
            if brevitas.is_brevitas_layer(layer):
                _fold(layer)
    return module


@torch.no_grad()
def _fold(layer: Any) -> None:
    weight, activation = _duq_of(layer.weight_quant), _duq_of(layer.input_quant)
    gain = torch.tensor(1.0) if activation is None else activation.c / activation.a
    if weight is None:
        _multiply_weight(layer, gain)
    else:
        quantized = layer.quant_weight().value * gain
        layer.weight = nn.Parameter(quantized, requires_grad=layer.weight.requires_grad)  # its own, where it was tied
        brevitas.use_fixed_weight_quantizer(layer, weight.bits, weight.c * gain)
    if activation is not None:
        brevitas.use_fixed_input_quantizer(layer, activation.bits, activation.a, signed=activation.signed)


def _multiply_weight(layer: Any, gain: Tensor) -> None:
    """Scale a weight and its learned scale alike: the codes stay."""
    layer.weight = nn.Parameter(layer.weight * gain, requires_grad=layer.weight.requires_grad)
    scale = brevitas.learned_scale(layer.weight_quant)
    if scale is not None:
        scale.mul_(gain)


def _duq_of(proxy: Any) -> DuQ | None:
    fused = getattr(proxy, "fused_activation_quant_proxy", None)
    tensor_quant = proxy.tensor_quant if fused is None else fused.tensor_quant
    return tensor_quant.duq if isinstance(tensor_quant, DuQTensorQuant) else None
