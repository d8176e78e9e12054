"""Reading an OpenVINO IR: where the codes are, and what feeds the layers that use them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_nncf.declaration import KEY, WEIGHT, Declaration, Found, Levels, declared_in, levels_by_user
from mpq_nncf.ir_storage import Storage, raw_bytes, storage_of, unpack
from mpq_plugins.common.plugins import require
from mpq_plugins.errors import FormatError

WEIGHTED = frozenset(("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul"))
# These hand on values of their input as they are, so what left the quantizer arrives quantized.
_PASSING = frozenset(
    "Reshape Transpose Squeeze Unsqueeze MaxPool AdaptiveMaxPool Split VariadicSplit Gather StridedSlice Slice Pad Broadcast "
    "Tile DepthToSpace SpaceToDepth ShuffleChannels ReverseSequence Relu ReduceMax Identity Convert".split()
)


@dataclass(frozen=True)
class Weight:
    """An integer weight constant: the node, its storage, and the operations that compute with it."""

    constant: Any
    storage: Storage
    operations: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The constant's friendly name."""
        return str(self.constant.get_friendly_name())

    def codes(self) -> np.ndarray:
        """Signed codes in the constant's shape."""
        shape = tuple(self.constant.get_output_shape(0))
        return unpack(raw_bytes(self.constant), int(np.prod(shape)), self.storage).reshape(shape)


def weights(model: Any) -> Iterator[Weight]:
    """Integer constants that a convolution or matrix product reads, in topological order."""
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant":
            continue
        storage = storage_of(node.get_element_type().get_type_name())
        if storage is not None:
            operations = tuple(_weighted_readers(node))
            if operations:
                yield Weight(node, storage, operations)


def _weighted_readers(node: Any) -> Iterator[Any]:
    for target in node.output(0).get_target_inputs():
        reader = target.get_node()
        kind = reader.get_type_name()
        if kind in WEIGHTED and target.get_index() == 1:
            yield reader
        elif kind in ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Unsqueeze") and target.get_index() == 0:
            yield from _weighted_readers(reader)


def feeding_quantizers(operation: Any) -> tuple[Any, ...]:
    """The FakeQuantize nodes that the data input of an operation comes from; None in place of a float source."""
    return tuple(_sources(operation.input_value(0)))


def _sources(output: Any) -> Iterator[Any]:
    node = output.get_node()
    kind = node.get_type_name()
    if kind == "FakeQuantize":
        yield node
    elif kind == "Concat":
        for value in node.input_values():
            yield from _sources(value)
    elif kind in _PASSING:
        yield from _sources(node.input_value(0))
    else:
        yield None


def levels_of(operation: Any) -> Levels:
    """Levels of the quantizers that feed an operation; None for a float source."""
    return tuple(None if node is None else int(node.get_attributes()["levels"]) for node in feeding_quantizers(operation))


def load_ir(path: Path) -> Any:
    """The OpenVINO model of an .xml with its .bin; raises `FormatError`."""
    openvino = require("openvino", "nncf")
    for part in (path, path.with_suffix(".bin")):
        if not part.is_file():
            raise FormatError(f"{part} does not exist. OpenVINO needs the .xml and the .bin of one export side by side.")
    try:
        # Memory mapping would let another export over the same file change a model that is being read.
        return openvino.Core().read_model(path, config={"ENABLE_MMAP": "NO"})
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise FormatError(f"OpenVINO cannot read {path} with its .bin: {reason}. Export it again.") from error


def read_ir(path: Path) -> tuple[Declaration | None, dict[str, Found]]:
    """What the file declares, and what it holds by stored name."""
    model = load_ir(path)
    declared = declared_in(model.get_rt_info(KEY).value if model.has_rt_info(KEY) else None, path)
    found = {}
    for weight in weights(model):
        holder = weight.name.removesuffix(WEIGHT)
        calls = [(operation.get_friendly_name(), levels_of(operation)) for operation in weight.operations]
        found[holder] = Found(weight.codes(), weight.storage.bits, levels_by_user(holder, calls))
    return declared, found
