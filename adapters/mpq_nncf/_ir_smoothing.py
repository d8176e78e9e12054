"""SmoothQuant's multiplications taken into the quantizers behind them.

OpenVINO's CPU plugin (2026.4) computes something else for a per-channel multiplication between a mean over the image and a
unsigned FakeQuantize of matrices [N, channel]; folded, it is right. With signed ranges it is the other way round: the
multiplication is right, and input ranges per channel are wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_SCALE = "._scale_value"  # of NNCF's module
_MATRIX = 2  # axes


def fold_smoothing(model: Any) -> None:
    """Let unsigned quantizers of matrices read what their multiplication reads, with ranges divided by its scales, in place."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize":
            continue
        product = node.input_value(0).get_node()
        scales = _scales(product)
        if scales is None or node.input_value(1).get_node().data.min() < 0:
            continue
        node.input(0).replace_source_output(product.input_value(0))
        for index in (1, 2):  # the lowest and the highest input; outputs stay
            bound = node.input_value(index).get_node().data / scales
            node.input(index).replace_source_output(opset13.constant(bound.astype(np.float32)).output(0))


def _scales(node: Any) -> np.ndarray | None:
    if node.get_type_name() != "Multiply" or len(node.get_output_partial_shape(0)) != _MATRIX:
        return None
    constant = node.input_value(1).get_node()
    if constant.get_type_name() != "Constant" or not constant.get_friendly_name().endswith(_SCALE):
        return None
    return np.asarray(constant.data)
