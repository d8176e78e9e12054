"""Quantizers of matrices as OpenVINO's CPU plugin computes them right.

The plugin (2026.4) merges a multiplication or addition per column into the FakeQuantize behind it where the data are a matrix
[N, column] of a number of rows that it does not know beforehand, and then computes something else: by default at widths other
than 4 and 8 bits, and without its low-precision transformations (`run` with `exact`) at every width. That meets batch
normalisation and SmoothQuant's factors in front of a linear layer. The same arithmetic per channel of an image is merged
correctly, and so is that of a fixed number of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_MERGED = frozenset("Add Subtract Multiply Divide".split())
_NEUTRAL = frozenset("Reshape Squeeze Unsqueeze Convert".split())  # may be removed as having no effect
_MATRIX = 2  # axes
_IMAGE = np.array([2, 3])  # the axes that an image has besides


def part_from_scaling(model: Any) -> None:
    """Give quantizers of matrices that columnwise arithmetic feeds images of one pixel, in place."""
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or len(node.get_output_partial_shape(0)) != _MATRIX:
            continue
        if not _is_columnwise(node.input_value(0).get_node()):
            continue
        readers = list(node.output(0).get_target_inputs())
        node.input(0).replace_source_output(opset13.unsqueeze(node.input_value(0), opset13.constant(_IMAGE)).output(0))
        node.validate_and_infer_types()
        squeezed = opset13.squeeze(node, opset13.constant(_IMAGE))
        for reader in readers:
            reader.replace_source_output(squeezed.output(0))


def _is_columnwise(node: Any) -> bool:
    """Whether a node adds or multiplies with a constant of several values, other than behind a layer normalisation."""
    found = False
    while node.get_type_name() in _MERGED | _NEUTRAL:
        data, *others = sorted((value.get_node() for value in node.input_values()), key=_is_constant)
        if node.get_type_name() in _MERGED:
            if not any(_is_constant(other) for other in others):
                return found
            found = found or any(_is_constant(other) and other.data.size > 1 for other in others)
        node = data
    # MVN takes the arithmetic behind it up itself, and correctly. Parted from its quantizer it gets another shape.
    return found and node.get_type_name() != "MVN"


def _is_constant(node: Any) -> bool:
    return bool(node.get_type_name() == "Constant")
