"""Quantizers behind arithmetic per channel, as OpenVINO's CPU plugin computes them right.

The plugin (2026.4) merges a multiplication or addition per channel, with or without a ReLU behind it, into the FakeQuantize
that reads it. Where the batch axis is open it then computes something else, at any rank whose channels are the second axis:
without its low-precision transformations (`run` with `exact`) at every width, by default at widths other than 4 and 8 bits,
behind a ReLU at those as well. That meets batch normalisation in front of a layer, input normalisation, LayerScale and
SmoothQuant's factors. Arithmetic that the operation before takes up, be it a convolution, a matrix product or a
normalisation, is computed right, and so is any with another operation between.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_ARITHMETIC = frozenset("Add Subtract Multiply Divide".split())
_LIMITS = frozenset("Relu Clamp".split())  # merged as well
_NEUTRAL = frozenset("Reshape Squeeze Unsqueeze Convert".split())  # may be removed as having no effect
_TAKING_UP = frozenset("Convolution GroupConvolution ConvolutionBackpropData GroupConvolutionBackpropData MatMul MVN".split())
_LEAST = np.array(np.finfo(np.float32).min)


def part_from_scaling(model: Any) -> None:
    """Put an operation that changes nothing between quantizers and the arithmetic per channel that feeds them, in place.

    It is the maximum with the least number there is: not merged into the quantizer, and of no shape of its own.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize" and _is_scaled(node.input_value(0)):
            parted = opset13.maximum(node.input_value(0), opset13.constant(_LEAST))
            node.input(0).replace_source_output(parted.output(0))


def _is_scaled(output: Any) -> bool:
    """Whether a tensor was added to or multiplied with a constant of several values that no operation before takes up."""
    found, is_read_once = False, True
    while output.get_node().get_type_name() in _ARITHMETIC | _LIMITS | _NEUTRAL:
        node = output.get_node()
        is_read_once = is_read_once and len(output.get_target_inputs()) == 1
        data, *others = sorted(node.input_values(), key=_is_constant)
        if node.get_type_name() in _ARITHMETIC:
            if not any(map(_is_constant, others)):
                return found
            found = found or any(_is_constant(other) and other.get_node().data.size > 1 for other in others)
        output = data
    is_read_once = is_read_once and len(output.get_target_inputs()) == 1
    return found and not (is_read_once and output.get_node().get_type_name() in _TAKING_UP)


def _is_constant(output: Any) -> bool:
    return bool(output.get_node().get_type_name() == "Constant")
