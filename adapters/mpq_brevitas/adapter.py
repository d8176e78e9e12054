"""The Brevitas adapter: what it offers; each method's work is in the file of its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

from mpq_brevitas.options import BrevitasOptions, Profile, QuantizerKind, Scales, options_of
from mpq_plugins.adapter.base import AbstractAdapter, check_prepared_with, not_defaults, parameters_of
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.common.allocator import keeping_memory
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.layers import Inventory, Layer
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from mpq_brevitas.compilers import Report
    from mpq_brevitas.run import InferenceCost


@final
@dataclass(frozen=True)
class BrevitasAdapter(AbstractAdapter):
    """Quantizes with Brevitas 0.13 and exports QONNX or ONNX QCDQ.

    `profile` "layerwise" replaces each layer where it stands, with its own input quantizer: any torch model, no tracing.
    "finn" traces the graph, merges batch normalisation, quantizes at the activation functions and aligns residual adds:
    what FINN accepts, for models that `torch.fx` can trace. Weights take 1 (binary) to 8 bits, activations 2 to 8.
    `quantizer` "duq" learns clip and output scale apart (PROFIT, Park and Yoo 2020), for training, "layerwise" only.
    `scales` "power-of-two" gives every tensor one scale 2^n, weights included, "finn" only.
    """

    profile: Profile = "layerwise"
    quantizer: QuantizerKind = "uniform"
    scales: Scales = "float"

    name: ClassVar[str] = "brevitas"
    formats: ClassVar[tuple[str, ...]] = ("qonnx", "qcdq")
    # QONNX and FINN take any width; one activation width keeps the default search small.
    weight_bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    activation_bits: ClassVar[tuple[int, ...]] = (8,)

    def __post_init__(self) -> None:
        self._options()  # refuses unknown ones
        if self.quantizer == "duq" and self.profile != "layerwise":
            raise AdapterError(
                'quantizer="duq" needs profile="layerwise": exporting it moves the output scale of an activation into the '
                "weights of the one layer that reads it, and in the finn profile several layers and adds read one."
            )
        if self.scales == "power-of-two" and self.profile != "finn":
            raise AdapterError('scales="power-of-two" is for FINN\'s shifts. Use it with profile="finn".')

    def _options(self) -> BrevitasOptions:
        return BrevitasOptions(self.profile, quantizer=self.quantizer, scales=self.scales)

    def refuse(self, layer: Layer, precision: Precision) -> str | None:
        """See `AbstractAdapter.refuse`."""
        from mpq_brevitas.support import refuse

        if self.quantizer == "duq" and precision.weight == 1:
            return "DuQ has no binary weights: its one-bit code is 0"
        return refuse(layer, precision)

    def advice(self, layer: Layer, precision: Precision) -> str | None:
        """See `AbstractAdapter.advice`."""
        from mpq_brevitas.support import advice

        return advice(layer, precision, self.profile)

    def unconvertible(self, model: nn.Module, inventory: Inventory, example: Any = None) -> Mapping[str, str]:
        """See `AbstractAdapter.unconvertible`."""
        from mpq_brevitas.support import unconvertible

        return unconvertible(model, inventory, self.profile, example)

    def activation_groups(self, model: nn.Module, example: Any) -> tuple[tuple[str, ...], ...]:
        """Layerwise: none, every layer has its own input quantizer. Finn: raises `AdapterError` if tracing fails."""
        if self.profile == "layerwise":
            return ()
        from mpq_brevitas.finn import build_graph
        from mpq_brevitas.groups import activation_groups_of_graph

        graph = build_graph(model, None, BrevitasOptions(self.profile, "max"))
        return tuple(group.layers for group in activation_groups_of_graph(graph.module) if len(group.layers) > 1)

    @keeping_memory()
    def prepare(self, model: nn.Module, bits: BitConfig, example: Any, calibration: Iterable[Any], **options: Any) -> nn.Module:
        """A quantized copy of `model`; layers outside `bits` keep float weights. Options: the fields of `PTQ`."""
        from mpq_brevitas.prepare import prepare

        return prepare(model, bits, example, calibration, self._options(), PTQ.of(options))

    @keeping_memory()
    def set_bits(
        self,
        module: nn.Module,
        bits: BitConfig,
        calibration: Iterable[Any] = (),
        *,
        batch_norm: Literal["corrected", "kept"] = "corrected",
    ) -> nn.Module:
        """See `AbstractAdapter.set_bits`."""
        from mpq_brevitas.set_bits import set_bits

        return set_bits(module, bits, calibration, batch_norm)

    def use_float_weights(self, module: nn.Module, on: bool = True) -> nn.Module:
        """See `AbstractAdapter.use_float_weights`."""
        from mpq_brevitas.set_bits import use_float_weights

        return use_float_weights(module, on)

    def export(self, module: nn.Module, path: str | Path, example: Any, *, format: str | None = None) -> Path:
        """See `AbstractAdapter.export`."""
        from mpq_brevitas.export import export

        return export(module, path, example, format=self.format_of(format))

    def read_bits(self, path: str | Path) -> BitConfig:
        """See `AbstractAdapter.read_bits`."""
        from mpq_brevitas.read import read_bits

        return read_bits(path)

    def codes(self, module: nn.Module) -> dict[str, np.ndarray]:
        """See `AbstractAdapter.codes`."""
        from mpq_brevitas.codes import codes

        return codes(module)

    def read_codes(self, path: str | Path) -> dict[str, np.ndarray]:
        """See `AbstractAdapter.read_codes`."""
        from mpq_brevitas.read import read_codes

        return read_codes(path)

    def run(self, path: str | Path, inputs: Any, *, exact: bool = True) -> list[np.ndarray]:
        """See `AbstractAdapter.run`."""
        from mpq_brevitas.run import run

        return run(path, inputs, exact=exact)

    def inference_cost(self, path: str | Path) -> InferenceCost:
        """qonnx's own count of bit operations and weight bits of a QONNX file."""
        from mpq_brevitas.run import inference_cost

        return inference_cost(path)

    def compiler_report(self, path: str | Path, *, environment: str | Path | None = None) -> Report:
        """What FINN's compiler makes of a QONNX file of the finn profile: `mpq_brevitas.compilers.judge` without a module."""
        from mpq_brevitas.compilers import judge

        return judge(path, environment=environment)

    def save(self, module: nn.Module, path: str | Path) -> Path:
        """See `AbstractAdapter.save`."""
        from mpq_brevitas.checkpoint import save

        return save(module, path)

    def load(self, model: nn.Module, path: str | Path, example: Any) -> nn.Module:
        """See `AbstractAdapter.load`; raises `AdapterError` for options other than those that the module was prepared with."""
        from mpq_brevitas.checkpoint import load

        module = load(model, path, example)
        check_prepared_with(self.prepared_with(module), not_defaults(self), path)
        return module

    def range_parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """See `AbstractAdapter.range_parameters`."""
        return parameters_of(module, ("brevitas", "mpq_brevitas", "mpq_plugins.quantizers"))

    def suffix(self, format: str | None = None) -> str:
        """See `AbstractAdapter.suffix`."""
        return ".onnx"

    def storage(self, precision: Precision, format: str | None = None) -> int:
        """See `AbstractAdapter.storage`: QONNX stores codes as floats, QCDQ as int8 and no binary ones."""
        if format in (None, "qonnx"):
            return 32
        return 8 if precision.weight > 1 else 0

    def prepared_with(self, module: nn.Module) -> Mapping[str, Any]:
        """See `AbstractAdapter.prepared_with`."""
        options = options_of(module)
        return {name: getattr(options, name) for name in ("profile", "quantizer", "scales")}
