"""Quantizers of matrices as OpenVINO's CPU plugin computes them right.

The plugin (2026.4) merges a multiplication or addition per column into the FakeQuantize behind it where the data are a matrix
[N, column] of a number of rows that it does not know beforehand, and then computes something else: by default at widths other
than 4 and 8 bits, with `EXACT` (see `_run.py`) at every width. That meets batch normalisation, layer normalisation and
SmoothQuant's factors in front of a linear layer. With three axes, or a fixed number of rows, it computes what the file says.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_MERGED = frozenset("Add Subtract Multiply Divide".split())
_NEUTRAL = frozenset("Reshape Squeeze Unsqueeze Convert".split())  # may be removed as having no effect
_MATRIX = 2  # axes


def part_from_scaling(model: Any) -> None:
    """Give quantizers of matrices that columnwise arithmetic feeds a third axis of length 1, in place."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or len(node.get_output_partial_shape(0)) != _MATRIX:
            continue
        if not _is_columnwise(node.input_value(0).get_node()):
            continue
        axis = opset13.constant(np.array([1]))
        readers = list(node.output(0).get_target_inputs())
        node.input(0).replace_source_output(opset13.unsqueeze(node.input_value(0), axis).output(0))
        node.validate_and_infer_types()
        squeezed = opset13.squeeze(node, axis)
        for reader in readers:
            reader.replace_source_output(squeezed.output(0))


def _is_columnwise(node: Any) -> bool:
    """Whether a node adds or multiplies with a constant of several values."""
    while node.get_type_name() in _NEUTRAL:
        node = node.input_value(0).get_node()
    return node.get_type_name() in _MERGED and any(
        value.get_node().get_type_name() == "Constant" and value.get_node().data.size > 1 for value in node.input_values()
    )
