"""The interface of a quantization framework."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mpq_plugins.adapter.record import RECORD, record, recorded_fact
from mpq_plugins.adapter.stages import guard_stages
from mpq_plugins.common.plugins import Kind, Plugin
from mpq_plugins.errors import AdapterError, FingerprintError
from mpq_plugins.model.layers import Inventory, Layer, unknown_layer
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class AbstractAdapter(Plugin, abc.ABC):
    """Turns a bit configuration into a framework's quantized module and reads it back from exported files.

    Implementations are frozen dataclasses of their options; they import their framework inside the methods that need it.
    What that raises is told as an `MPQError` of the stage, and models come checked (see `stages.py`).
    `formats` lists what `export` writes, the default first. `weight_bits` and `activation_bits` are what the target
    really stores and runs: the default menu of a search.
    """

    plugin_kind: ClassVar[Kind] = "adapters"
    name: ClassVar[str]
    formats: ClassVar[tuple[str, ...]]
    weight_bits: ClassVar[tuple[int, ...]]
    activation_bits: ClassVar[tuple[int, ...]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        guard_stages(cls)

    @abc.abstractmethod
    def refuse(self, layer: Layer, precision: Precision) -> str | None:
        """Why the framework cannot have `layer` at `precision`, or None when it can."""

    @abc.abstractmethod
    def advice(self, layer: Layer, precision: Precision) -> str | None:
        """What a user should know before deploying `layer` at `precision` (simulated, slower, larger), or None."""

    @abc.abstractmethod
    def unconvertible(self, model: nn.Module, inventory: Inventory, example: Any = None) -> Mapping[str, str]:
        """Layer name -> reason, for layers of this very model that the framework would leave in float.

        `example` is an input as the model takes it: with one, what only a forward pass shows is known too.
        """

    def check(self, model: nn.Module, bits: BitConfig, example: Any) -> tuple[Layer, ...]:
        """The layers that `bits` are for, in order; what `prepare` and `load` begin with.

        Raises `UnknownLayerError` and `FingerprintError` (see `BitConfig.check`), and `AdapterError` for what `refuse` or
        `unconvertible` gives a reason against.
        """
        from mpq_plugins.model.discover import find_layers

        inventory = find_layers(model, example)
        bits.check(inventory)
        layers = tuple(layer for layer in inventory if layer.name in bits.layers)
        reasons = self.unconvertible(model, inventory, example)
        for layer in layers:
            reason = reasons.get(layer.name) or self.refuse(layer, bits[layer.name])
            if reason is not None:
                raise AdapterError(f"{self.name} cannot have {layer.name} at {bits[layer.name]}: {reason}. Exclude the layer.")
        return layers

    def format_of(self, format: str | None) -> str:
        """The format asked for, or the first; raises `AdapterError` for one that there is not."""
        chosen = self.formats[0] if format is None else format
        if chosen not in self.formats:
            raise AdapterError(f"{self.name} writes {', '.join(self.formats)}, not {chosen!r}. Choose one of them (--format).")
        return chosen

    @abc.abstractmethod
    def activation_groups(self, model: nn.Module, example: Any) -> tuple[tuple[str, ...], ...]:
        """Layers that the framework makes share one activation quantizer, so that their activation bits must agree."""

    @abc.abstractmethod
    def prepare(self, model: nn.Module, bits: BitConfig, example: Any, calibration: Iterable[Any], **options: Any) -> nn.Module:
        """A calibrated quantized copy of `model`, repaired as `PTQ` says, trainable and deep-copyable.

        `calibration` items are read by `Batch.of`; `options` are the fields of `PTQ`. Raises `FingerprintError` and
        `UnknownLayerError` (see `BitConfig.check`), `AdapterError` for what the framework cannot do, `DataError` without
        calibration data.
        """

    def set_bits(
        self,
        module: nn.Module,
        bits: BitConfig,
        calibration: Iterable[Any] = (),
        *,
        batch_norm: Literal["corrected", "kept"] = "corrected",
    ) -> nn.Module:
        """Switch a prepared module in place to `bits` of all its layers, and return it; its parameters stay the same objects.

        Quantizers that keep their width keep their range, be it calibrated or learned. The others get new ones, as `prepare`
        was told to fit them: weights always; activations where there are `calibration` batches, from what reaches them in
        the module as it stands before the switch, and else their thresholds stay. Weights trained under quantization and
        batch normalisation that follows them make sense together only like that; a float computation would be another one.
        With batches the statistics of normalisations move by what the switch did to them ("corrected").
        Raises `UnknownLayerError`, `FingerprintError` and `AdapterError` before anything is changed.
        """
        raise AdapterError(f"the adapter {self.name!r} cannot switch the bits of a prepared module. Prepare it anew.")

    def use_float_weights(self, module: nn.Module, on: bool = True) -> nn.Module:
        """Leave the weights of a prepared module unquantized, or quantize them again, in place; returns the module.

        Quantizers that begin again get ranges for what the weights have become.
        """
        raise AdapterError(f"the adapter {self.name!r} cannot leave weights unquantized. Train without that stage.")

    @abc.abstractmethod
    def export(self, module: nn.Module, path: str | Path, example: Any, *, format: str | None = None) -> Path:
        """Write the quantized module as `format` (one of `formats`), whole or not at all; returns the main file."""

    @abc.abstractmethod
    def read_bits(self, path: str | Path) -> BitConfig:
        """The bits that an exported file really holds, from the file alone; raises `FormatError`."""

    @abc.abstractmethod
    def codes(self, module: nn.Module) -> dict[str, np.ndarray]:
        """Layer name -> integer weight codes of the quantized module, in the shape of the float weight."""

    @abc.abstractmethod
    def read_codes(self, path: str | Path) -> dict[str, np.ndarray]:
        """Layer name -> integer weight codes that an exported file holds, in the shape of the float weight."""

    @abc.abstractmethod
    def run(self, path: str | Path, inputs: Any, *, exact: bool = True) -> list[np.ndarray]:
        """Outputs of an exported file on `inputs`, through the target's runtime with the file's exact semantics.

        With `exact=False` the runtime executes the file as it does by default, with the optimisations users get.
        """

    @abc.abstractmethod
    def save(self, module: nn.Module, path: str | Path) -> Path:
        """Write the quantized module as a checkpoint that `load` reads with `weights_only=True`."""

    @abc.abstractmethod
    def load(self, model: nn.Module, path: str | Path, example: Any) -> nn.Module:
        """The quantized module of a checkpoint, rebuilt on the float `model`; raises `FormatError`."""

    def compiler_report(self, path: str | Path, *, environment: str | Path | None = None) -> Any:
        """What the target's own compiler makes of an exported file: `ok`, `check()`, `to_json()`, and its text for people.

        `environment` is the folder that the compiler is installed in. Raises `AdapterError` where there is none.
        """
        raise AdapterError(f"the adapter {self.name!r} knows no compiler to ask. Leave the compiler out.")

    def prepared_with(self, module: nn.Module) -> Mapping[str, Any]:
        """The options of the adapter that are part of a prepared module, by name; its checkpoint keeps them."""
        return {}

    def range_parameters(self, module: nn.Module) -> Iterable[nn.Parameter]:
        """The parameters of a prepared module that are ranges of quantizers: they learn slower than weights, and never decay.

        None unless an adapter names some, as for one whose ranges do not learn. `parameters_of` finds them by their classes.
        """
        return ()

    def suffix(self, format: str | None = None) -> str:
        """What the names of exported files of a format (default: the first) end in, such as `.onnx`."""
        return ""

    def storage(self, precision: Precision, format: str | None = None) -> int:
        """Bits that a file of a format (default: the first) spends on each weight; 0 where it cannot hold the precision."""
        return precision.weight

    def overhead(self, layer: Layer, format: str | None = None) -> int:
        """Bytes of a layer in such a file besides its weight: a float scale and bias for each output channel."""
        return 8 * layer.out_channels


def check_prepared_with(found: Mapping[str, Any], asked: Mapping[str, Any], path: str | Path) -> None:
    """Raise `AdapterError` for options asked for that differ from those `found` in the module of a checkpoint."""
    for name, value in asked.items():
        if name in found and found[name] != value:
            raise AdapterError(
                f"{name}={_shown(value)} was asked for, but {path} was prepared with {name}={_shown(found[name])}, which is "
                "part of the module. Leave the option out, or prepare the model anew with it (`mpq apply`)."
            )


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def not_defaults(adapter: AbstractAdapter) -> dict[str, Any]:
    """The options of an adapter that differ from their defaults: what was asked for on purpose."""
    fields = dataclasses.fields(adapter)  # type: ignore[arg-type]  # a dataclass, which types cannot say
    values = {field.name: getattr(adapter, field.name) for field in fields}
    return {field.name: values[field.name] for field in fields if values[field.name] != field.default}


def is_prepared(module: nn.Module) -> bool:
    """Whether an adapter made the module: it has bits."""
    return isinstance(recorded_fact(module, "bits"), BitConfig)


def adapter_of(module: nn.Module) -> AbstractAdapter | None:
    """The adapter whose `prepare` or `load` made the module, or a part of it; None for a float one."""
    records = (vars(part).get(RECORD, {}) for part in module.modules())
    return next((known["adapter"] for known in records if "adapter" in known), None)


def parameters_of(module: nn.Module, packages: Iterable[str]) -> list[nn.Parameter]:
    """The parameters that modules of these packages hold themselves, unless they derive from a layer of torch.

    With the packages of a framework and of its adapter these are the ranges of quantizers: a quantized layer derives from a
    layer of torch, and its weight is a weight. Nothing is imported to tell.
    """

    own = tuple(f"{package}." for package in packages)

    def holds_ranges(kind: type) -> bool:
        bases = {base.__module__ for base in kind.__mro__} - {"torch.nn.modules.module"}
        return f"{kind.__module__}.".startswith(own) and not any(base.startswith("torch.nn.modules.") for base in bases)

    holders = [part for part in module.modules() if holds_ranges(type(part))]
    return list({id(held): held for part in holders for held in part.parameters(recurse=False)}.values())


def bits_of(module: nn.Module) -> BitConfig:
    """The bit configuration that a quantized module was prepared with, inside wrappers too."""
    bits = recorded_fact(module, "bits")
    if not isinstance(bits, BitConfig):
        raise AdapterError(f"{type(module).__name__} was not made by an adapter's prepare() or load(). Call that first.")
    return bits


def attach_bits(module: nn.Module, bits: BitConfig) -> nn.Module:
    """Let a quantized module remember the bit configuration it was prepared with; deepcopy keeps it."""
    return record(module, bits=bits)


def check_switch(old: BitConfig, new: BitConfig) -> None:
    """Make sure that a module of `old` bits can be asked for `new` ones: the same layers of the same model.

    Raises `UnknownLayerError`, `FingerprintError` and, for layers without new bits, `AdapterError`.
    """
    for name in new.layers:
        if name not in old.layers:
            raise unknown_layer(name, list(old.layers))
    if new.fingerprint != old.fingerprint:
        raise FingerprintError(
            f"the bits are for a model with fingerprint {new.fingerprint[:19]}..., the module was prepared from one with "
            f"{old.fingerprint[:19]}.... Give bits of the same model."
        )
    missing = sorted(set(old.layers) - set(new.layers))
    if missing:
        raise AdapterError(f"no bits are given for {', '.join(missing)}, which the module has quantized. Give them too.")
