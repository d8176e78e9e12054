"""The adapter: what `AbstractAdapter` asks for, delegated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from mpq_nncf.options import NNCFOptions
from mpq_plugins.adapter.base import AbstractAdapter, bits_of, check_prepared_with, not_defaults, parameters_of
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.common.allocator import keeping_memory
from mpq_plugins.model.layers import Inventory, Layer
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


# Weight bits (the index) -> bits per stored weight, by format; 0 where it cannot store them. OpenVINO has no 5-bit and no
# 7-bit type.
_STORAGE: Mapping[str, Sequence[int]] = {
    "openvino-compact": (0, 0, 2, 3, 4, 6, 6, 8, 8),
    "openvino-fast": (0, 0, 8, 8, 8, 8, 8, 8, 8),
    "onnx": (0, 0, 8, 8, 8, 8, 8, 8, 8),
    "onnx-compact": (0, 0, 2, 4, 4, 8, 8, 8, 8),
}
_RANGES = 32  # bytes of the activation range, zero point and shapes of a layer in OpenVINO IR
_DEPTHWISE_RANGES = 3 * 4  # NNCF quantizes the input of a depthwise convolution by channel


@final
@dataclass(frozen=True)
class NNCFAdapter(AbstractAdapter):
    """NNCF 3.x quantization, exported to OpenVINO IR or ONNX.

    The default menu is what OpenVINO really stores (weights of 2, 3, 4, 6 and 8 bits) and runs in integers (activations of 8
    bits, or 4 when asked for); every width from 2 to 8 works when asked for.

    `merge_branches`: layers that read one tensor share its quantizer, as NNCF places them; False gives each its own.
    `asymmetric`: activations with a zero point, for models with GELU, SiLU and the like.
    `overflow_fix`: no w8a8, whose sums saturate in OpenVINO's integer kernels on CPUs without VNNI; 7-bit weights cannot.
    """

    name: ClassVar[str] = "nncf"
    formats: ClassVar[tuple[str, ...]] = ("openvino-compact", "openvino-fast", "onnx", "onnx-compact")
    weight_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 6, 8)
    activation_bits: ClassVar[tuple[int, ...]] = (8,)

    merge_branches: bool = True
    asymmetric: bool = False
    overflow_fix: bool = False

    def __post_init__(self) -> None:
        if self.overflow_fix:  # the default menu of this adapter then ends at 7 bits
            object.__setattr__(self, "weight_bits", (*self.weight_bits[:-1], 7))

    def refuse(self, layer: Layer, precision: Precision) -> str | None:
        """See `AbstractAdapter.refuse`: NNCF has no binary weights, and `overflow_fix` no w8a8."""
        from mpq_nncf.support import refuse

        return refuse(precision, overflow_fix=self.overflow_fix)

    def advice(self, layer: Layer, precision: Precision) -> str | None:
        """See `AbstractAdapter.advice`: what OpenVINO's CPU plugin makes of the precision."""
        from mpq_nncf.support import advice

        return advice(layer, precision)

    def unconvertible(self, model: nn.Module, inventory: Inventory, example: Any = None) -> Mapping[str, str]:
        """See `AbstractAdapter.unconvertible`; with an `example` NNCF's own trace is asked too."""
        from mpq_nncf.support import unconvertible

        return unconvertible(model, inventory, example)

    def activation_groups(self, model: nn.Module, example: Any) -> tuple[tuple[str, ...], ...]:
        """See `AbstractAdapter.activation_groups`: from the quantizer setup NNCF computes, without calibration."""
        from mpq_nncf.groups import activation_groups

        return activation_groups(model, example, NNCFOptions(self.merge_branches, self.asymmetric))

    @keeping_memory()
    def prepare(
        self,
        model: nn.Module,
        bits: BitConfig,
        example: Any,
        calibration: Iterable[Any],
        *,
        subset: int = 64,
        **options: Any,
    ) -> nn.Module:
        """See `AbstractAdapter.prepare`; `subset` is the most calibration batches that are read.

        Also raises `AdapterError` for the equalization and rounding that NNCF lacks on torch models.
        """
        from mpq_nncf.prepare import prepare
        from mpq_nncf.support import check_precisions

        check_precisions(bits.layers, overflow_fix=self.overflow_fix)
        kept = NNCFOptions(self.merge_branches, self.asymmetric)
        return prepare(model, bits, example, calibration, kept, PTQ.of(options), subset=subset)

    @keeping_memory()
    def set_bits(
        self,
        module: nn.Module,
        bits: BitConfig,
        calibration: Iterable[Any] = (),
        *,
        batch_norm: Literal["corrected", "kept"] = "corrected",
    ) -> nn.Module:
        """See `AbstractAdapter.set_bits`; quantizers that keep their width keep their range."""
        from mpq_nncf.set_bits import set_bits
        from mpq_nncf.support import check_precisions

        check_precisions(bits.layers, overflow_fix=self.overflow_fix)
        return set_bits(module, bits, calibration, batch_norm)

    def use_float_weights(self, module: nn.Module, on: bool = True) -> nn.Module:
        """See `AbstractAdapter.use_float_weights`; codes, checkpoints and files stay those of the quantized weights."""
        from mpq_nncf.set_bits import use_float_weights

        return use_float_weights(module, on)

    def export(self, module: nn.Module, path: str | Path, example: Any, *, format: str | None = None) -> Path:
        """See `AbstractAdapter.export`; OpenVINO's two files are `path` and its neighbour ending in .bin.

        A name without the format's suffix gets it; raises `AdapterError` for one with the suffix of another.
        """
        from mpq_nncf.export import export

        return export(module, path, example, format=self.format_of(format))

    def read_bits(self, path: str | Path) -> BitConfig:
        """See `AbstractAdapter.read_bits`; the file's suffix says which reader."""
        from mpq_nncf.read import read_bits

        return read_bits(path)

    def codes(self, module: nn.Module) -> dict[str, np.ndarray]:
        """See `AbstractAdapter.codes`."""
        from mpq_nncf.codes import codes

        return codes(module)

    def read_codes(self, path: str | Path) -> dict[str, np.ndarray]:
        """See `AbstractAdapter.read_codes`."""
        from mpq_nncf.read import read_codes

        return read_codes(path)

    def run(self, path: str | Path, inputs: Any, *, exact: bool = True) -> list[np.ndarray]:
        """See `AbstractAdapter.run`; with `exact=False` as the runtime executes by default."""
        from mpq_nncf.run import run

        return run(path, inputs, exact=exact)

    def save(self, module: nn.Module, path: str | Path) -> Path:
        """See `AbstractAdapter.save`."""
        from mpq_nncf.checkpoint import save

        return save(module, path)

    def load(self, model: nn.Module, path: str | Path, example: Any) -> nn.Module:
        """See `AbstractAdapter.load`; raises `AdapterError` where the checkpoint was prepared with other options."""
        from mpq_nncf.checkpoint import load
        from mpq_nncf.support import check_precisions

        module = load(model, path, example)
        check_prepared_with(self.prepared_with(module), not_defaults(self), path)
        check_precisions(bits_of(module).layers, overflow_fix=self.overflow_fix)
        return module

    def prepared_with(self, module: nn.Module) -> Mapping[str, Any]:
        """See `AbstractAdapter.prepared_with`; of checkpoints older than this record it is whether there are zero points."""
        from mpq_nncf.checkpoint import prepared_with

        return prepared_with(module)

    def range_parameters(self, module: nn.Module) -> Sequence[nn.Parameter]:
        """See `AbstractAdapter.range_parameters`."""
        return parameters_of(module, ("nncf", "mpq_nncf"))

    def suffix(self, format: str | None = None) -> str:
        """See `AbstractAdapter.suffix`."""
        from mpq_nncf.export import SUFFIXES

        return SUFFIXES[self.format_of(format)]

    def storage(self, precision: Precision, format: str | None = None) -> int:
        """See `AbstractAdapter.storage`; weights of 3 and 6 bits are packed in groups of three bytes."""
        return _STORAGE[self.format_of(format)][precision.weight]

    def overhead(self, layer: Layer, format: str | None = None) -> int:
        """See `AbstractAdapter.overhead`. With OpenVINO's `.bin` this is a bound: equal constants are stored once there."""
        size = super().overhead(layer, format)
        if self.format_of(format).startswith("onnx"):
            return size
        is_depthwise = layer.groups > 1 and layer.groups == layer.input_shape[0]
        return size + _RANGES + (_DEPTHWISE_RANGES * layer.groups if is_depthwise else 0)

    def write_legacy_config(self, model: nn.Module, bits: BitConfig, example: Any, path: str | Path) -> Path:
        """Write the bits as a JSON configuration of NNCF 2.x; see docs/nncf.md."""
        from mpq_nncf.legacy_config import write_legacy_config

        return write_legacy_config(model, bits, example, path)
