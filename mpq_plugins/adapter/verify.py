"""Is what was exported what was asked for?"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpq_plugins.adapter.base import AbstractAdapter, bits_of
from mpq_plugins.common.files import write_json
from mpq_plugins.common.html import html_table
from mpq_plugins.common.plugins import make, resolve, resolve_all
from mpq_plugins.costs.base import AbstractCost, format_amount
from mpq_plugins.errors import FormatError, PluginError, VerificationError
from mpq_plugins.model.layers import Layer
from mpq_plugins.model.run import Batch, tensors
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision

if TYPE_CHECKING:
    from torch import nn

FORMAT = "mpq-verification/1"
_NOT_FINITE = 1e300  # stands for infinity, which JSON does not have
_FACTOR, _CEILING = 3, 0.25  # of the module's own difference that a file may have; never more standard deviations
# With 4 roundings a random ResNet-18 at 8 bits differs from itself as much as from its OpenVINO and QONNX files.
_ROUNDINGS, _TRIES = 4, 8


@dataclass(frozen=True)
class LayerCheck:
    """One layer: the precision asked for and found, and how many weight codes differ (None: not compared)."""

    name: str
    asked: str
    found: str | None
    n_codes: int | None = None
    n_different: int | None = None

    @property
    def ok(self) -> bool:
        """Whether bits are as asked and all compared codes are equal."""
        return self.asked == self.found and not self.n_different


@dataclass(frozen=True)
class OutputCheck:
    """Outputs of the file against the module.

    `mean_relative` is the mean absolute difference over the standard deviation of the module's output, `max_absolute` the
    largest difference, `top1_agreement` the share of rows with the same largest entry: of the module as users call it and the
    file executed exactly. `deployed` is the mean relative difference when the runtime executes the file as it does by
    default. Each is the worst over `batch_sizes`; `refused_batch` tells why another batch size was not compared.

    Where the tolerance alone is not met, `own_difference` is the mean relative difference of the module from itself when the
    sums of its layers are a few roundings off. `watched_difference` is its control: the same measurement without roundings.
    """

    mean_relative: float
    max_absolute: float
    top1_agreement: float
    tolerance: float
    own_difference: float = 0.0
    watched_difference: float = 0.0
    deployed: float | None = None
    batch_sizes: tuple[int, ...] = ()
    refused_batch: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the mean relative difference is within what is allowed."""
        return self.mean_relative < _NOT_FINITE and self.mean_relative <= self.allowed

    @property
    def allowed(self) -> float:
        """The tolerance, or three times what the module differs from itself, but never more than a quarter.

        Beyond that outputs say nothing about the file any more: unrelated ones differ by about 1.
        """
        return max(self.tolerance, min(_FACTOR * self.own_difference, _CEILING))

    @property
    def is_watched_alike(self) -> bool:
        """Whether the module computes the same while its layers are watched: only then is rounding what moves it."""
        return self.watched_difference <= self.tolerance

    @property
    def is_deployed_alike(self) -> bool:
        """Whether the runtime's own optimisations leave the outputs recognisable."""
        return self.deployed is None or self.deployed <= max(_CEILING, _FACTOR * self.own_difference)


@dataclass(frozen=True)
class BudgetCheck:
    """A budget of the bit configuration against the bits found in the file; `found` is None where its cost is not known."""

    name: str
    limit: float
    found: float | None
    unit: str = ""

    @property
    def ok(self) -> bool:
        """Whether the file keeps the budget, as far as that can be told."""
        return self.found is None or self.found <= self.limit * (1 + 1e-9)

    def __str__(self) -> str:
        limit = format_amount(self.limit, self.unit)
        if self.found is None:
            return f"budget {self.name}: not checked, no costs plugin has that name (verify(costs=[...]) takes an object)"
        return f"budget {self.name}: {format_amount(self.found, self.unit)} of {limit}"


@dataclass(frozen=True)
class Verification:
    """The result of reading an exported file back.

    `fingerprints` are the configuration's and the file's where they differ: the file was exported from another model.
    """

    artifact: str
    adapter: str
    layers: tuple[LayerCheck, ...]
    unexpected: tuple[str, ...] = ()
    outputs: OutputCheck | None = None
    budgets: tuple[BudgetCheck, ...] = ()
    fingerprints: tuple[str, str] | None = None

    def __repr__(self) -> str:
        problems, n_codes = self.problems, sum(check.n_codes or 0 for check in self.layers)
        found = f"{len(problems)} problems" if problems else "holds what was asked for"
        facts = [f"Verification of {self.artifact} ({self.adapter}): {found}", f"{len(self.layers)} layers, {n_codes:,} codes"]
        if self.outputs is not None:
            facts.append(f"outputs differ by {self.outputs.mean_relative:.1e}, {self.outputs.allowed:.1e} are allowed")
        return "\n  ".join([*facts, *(text[:200] for text in problems[: 5 - len(facts)])])

    def _repr_html_(self) -> str:
        rows = [
            (one.name, one.asked, one.found or "float", one.n_codes or "", one.n_different if one.n_codes else "")
            for one in self.layers
        ]
        header = ("layer", "asked", "found", "codes", "different")
        return html_table(repr(self).split("\n")[0], header, rows, [*self.problems, *map(str, self.budgets)])

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one sentence each; empty when the file holds what was asked for."""
        found = []
        if self.fingerprints is not None:
            asked, held = (text[:19] for text in self.fingerprints)
            found.append(f"the file is of a model with fingerprint {held}..., the bit configuration of one with {asked}...")
        found += [
            f"{check.name}: asked for {check.asked}, the file holds {check.found or 'no such quantized layer'}"
            for check in self.layers
            if check.asked != check.found
        ]
        found += [
            f"{check.name}: {check.n_different} of {check.n_codes} weight codes differ from the module's"
            for check in self.layers
            if check.n_different
        ]
        found += [f"{name}: quantized in the file, not asked for" for name in self.unexpected]
        if self.outputs is not None and self.outputs.mean_relative >= _NOT_FINITE:
            found.append(
                "the outputs of the file, or of the module, are not finite: look for weights that training blew up, or for "
                "inputs that are not finite themselves"
            )
        elif self.outputs is not None and not self.outputs.ok:
            found.append(
                f"outputs differ by {self.outputs.mean_relative:.2e} of their standard deviation on average, "
                f"more than the {self.outputs.allowed:.1e} allowed (tolerance {self.outputs.tolerance:.0e}; the module differs "
                f"from itself by {self.outputs.own_difference:.1e} when its sums are rounded otherwise)"
            )
        if self.outputs is not None and not self.outputs.is_watched_alike:
            found.append(
                f"the module differs from itself by {self.outputs.watched_difference:.1e} while its layers are watched: called "
                "in evaluation mode without gradients it does not run its quantized layers, as with fused kernels. "
                "torch.backends.mha.set_fastpath_enabled(False) switches those of attention off"
            )
        if self.outputs is not None and self.outputs.ok and not self.outputs.is_deployed_alike:
            found.append(
                f"as the runtime executes the file by default, outputs differ by {self.outputs.deployed:.2e} of their standard "
                f"deviation, executed exactly by {self.outputs.mean_relative:.2e}: its optimisations change this network. "
                "Export another format, or compare on the machine that shall run it"
            )
        found += [
            f"budget {check.name}: the file needs {format_amount(check.found, check.unit)}, allowed are "
            f"{format_amount(check.limit, check.unit)}"
            for check in self.budgets
            if check.found is not None and not check.ok
        ]
        return tuple(found)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def check(self) -> Verification:
        """Itself when nothing is wrong; raises `VerificationError` with the problems otherwise."""
        if not self.ok:
            listed = "\n  ".join(self.problems[:10])
            raise VerificationError(
                f"{self.artifact} does not hold what was asked for ({len(self.problems)} problems):\n  {listed}\n"
                "Export it again from the module; if the problem stays, report it with this list."
            )
        return self

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            "format": FORMAT,
            "artifact": Path(self.artifact).name,
            "adapter": self.adapter,
            "ok": self.ok,
            "problems": list(self.problems),
            "layers": {check.name: {k: v for k, v in asdict(check).items() if k != "name"} for check in self.layers},
            "unexpected": list(self.unexpected),
            "fingerprints": None if self.fingerprints is None else list(self.fingerprints),
            "outputs": None if self.outputs is None else {**asdict(self.outputs), "ok": self.outputs.ok},
            "budgets": [{**asdict(check), "ok": check.ok} for check in self.budgets],
        }

    def save(self, path: str | Path) -> Path:
        """Write the report as JSON."""
        return write_json(path, json.loads(json.dumps(self.to_json(), allow_nan=False)))


def verify(
    adapter: AbstractAdapter | type[AbstractAdapter] | str,
    path: str | Path,
    bits: BitConfig,
    *,
    module: nn.Module | None = None,
    inputs: Any = None,
    model: nn.Module | None = None,
    tolerance: float = 1e-3,
    costs: Iterable[AbstractCost | str] | AbstractCost | str = (),
) -> Verification:
    """Read an exported file back and compare it with the bit configuration.

    Args:
        adapter: that of the export: a name, class or object.
        path: the exported file.
        bits: what was asked for.
        module: the quantized module, to compare every weight code.
        inputs: what `module` takes, to compare outputs.
        model: the float model, to check the budgets that `bits` records; needs `inputs`.
        tolerance: of the mean output difference, in standard deviations of the module's outputs. Single outputs differ by a
            quantization step where two implementations round a tie differently.
        costs: those of budgets that no registered plug-in names.

    Raises `FormatError` for a file that cannot be read; `Verification.check` raises what differs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
        >>> q = mpq.quantize(model, torch.randn(32, 16), budgets="size=w4", adapter="brevitas")
        >>> mpq.verify("brevitas", q.export("q.onnx").path, q.bits, module=q.module).ok
        True
    """
    target: AbstractAdapter = resolve("adapters", adapter)
    found = target.read_bits(path)
    is_other = found.fingerprint not in ("", bits.fingerprint)  # empty: the file does not say
    return Verification(
        artifact=str(path),
        adapter=target.name,
        layers=_layer_checks(target, path, bits, found, module),
        unexpected=tuple(sorted(set(found.layers) - set(bits.layers))),
        outputs=None if module is None or inputs is None else _compare_outputs(target, path, module, inputs, tolerance),
        budgets=() if model is None or inputs is None else _budget_checks(model, inputs, bits, found, costs),
        fingerprints=(bits.fingerprint, found.fingerprint) if is_other else None,
    )


def _layer_checks(
    adapter: AbstractAdapter, path: str | Path, bits: BitConfig, found: BitConfig, module: nn.Module | None
) -> tuple[LayerCheck, ...]:
    wanted = {} if module is None else adapter.codes(module)
    stored = {} if module is None else adapter.read_codes(path)
    checks = []
    for name, asked in bits.layers.items():
        n_codes = n_different = None
        if name in wanted:
            n_codes, n_different = _count_differences(wanted[name], stored.get(name))
        precision = found.layers.get(name)
        checks.append(LayerCheck(name, str(asked), None if precision is None else str(precision), n_codes, n_different))
    return tuple(checks)


def _count_differences(wanted: np.ndarray, stored: np.ndarray | None) -> tuple[int, int]:
    if stored is None or stored.shape != wanted.shape:
        return wanted.size, wanted.size
    return wanted.size, int(np.count_nonzero(stored != wanted))


def _compare_outputs(
    adapter: AbstractAdapter, path: str | Path, module: nn.Module, inputs: Any, tolerance: float
) -> OutputCheck:
    batch = Batch(inputs)
    if [array.size for array in adapter.run(path, inputs)] != [array.size for array in _outputs(module, inputs)]:
        # An output of the whole batch, such as a mean, and a file that takes one image: one image is what they can share.
        check = _compare_batch(adapter, path, module, batch.part(0, 1).inputs, tolerance)
        return replace(check, refused_batch=f"{len(batch)}: the outputs have another size")
    check = _compare_batch(adapter, path, module, inputs, tolerance)
    other = batch.part(0, 1) if len(batch) > 1 else batch.doubled()
    try:
        second = _compare_batch(adapter, path, module, other.inputs, tolerance)
    except Exception as error:  # a file or a module that is made for one batch size raises whatever its runtime raises
        return replace(check, refused_batch=f"{len(other)}: {type(error).__name__}: {str(error).strip()[:200]}")
    worst = max((check, second), key=lambda one: (not one.ok, not one.is_deployed_alike, one.mean_relative))
    deployed = [one.deployed for one in (check, second) if one.deployed is not None]
    return replace(worst, deployed=max(deployed, default=None), batch_sizes=(len(batch), len(other)))


def _compare_batch(adapter: AbstractAdapter, path: str | Path, module: nn.Module, inputs: Any, tolerance: float) -> OutputCheck:
    expected = _outputs(module, inputs)
    deployed = compare_outputs(adapter.run(path, inputs, exact=False), expected, tolerance=tolerance).mean_relative
    check = replace(
        compare_outputs(adapter.run(path, inputs), expected, tolerance=tolerance),
        deployed=deployed,
        batch_sizes=(len(Batch(inputs)),),
    )
    if check.ok and check.is_deployed_alike:
        return check
    # A sum that ends on a rounding tie flips a code when it is rounded otherwise on the way; deep networks of few bits, above
    # all untrained ones, amplify that. Two runtimes cannot agree better than one does with itself.
    enough = max(check.mean_relative, deployed) / _FACTOR
    with _rounded_otherwise(module, 0, roundings=0):
        watched = _outputs(module, inputs)
    return replace(
        check,
        own_difference=_own_difference(module, inputs, watched, enough=enough),
        watched_difference=compare_outputs(watched, expected, tolerance=0.0).mean_relative,
    )


def _own_difference(module: nn.Module, inputs: Any, expected: Sequence[np.ndarray], *, enough: float) -> float:
    """The largest mean difference of some tries in which every layer's sums are rounded otherwise; stops at `enough`.

    `expected` are outputs of the module with its layers watched, so that roundings are all that differs. Ties are rare where
    codes are few: one try may meet none of those that the other runtime meets.
    """
    largest = 0.0
    for seed in range(_TRIES):
        with _rounded_otherwise(module, seed):
            found = _outputs(module, inputs)
        largest = max(largest, compare_outputs(found, expected, tolerance=0.0).mean_relative)
        if largest >= enough:
            break
    return largest


@contextlib.contextmanager
def _rounded_otherwise(module: nn.Module, seed: int, roundings: int = _ROUNDINGS) -> Iterator[None]:
    """Adds noise of some roundings of single precision, of each channel's typical value, to what quantized layers return."""
    import torch

    from mpq_plugins.adapter.hooks import hooked

    generator = torch.Generator().manual_seed(seed)

    def noisy(layer: nn.Module, _: Any, result: Any) -> Any:
        if not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        channel = result.ndim - 1 if isinstance(layer, torch.nn.Linear) else 1
        others = [axis for axis in range(result.ndim) if axis != channel]
        typical = result.square().mean(others, keepdim=True).sqrt()
        noise = torch.randn(result.shape, generator=generator).to(result)
        return result + roundings * torch.finfo(torch.float32).eps * typical * noise

    names = set(bits_of(module).layers)
    with hooked(layer.register_forward_hook(noisy) for name, layer in module.named_modules() if name in names):
        yield


def _outputs(module: nn.Module, inputs: Any) -> list[np.ndarray]:
    from mpq_plugins.model.run import call, evaluating

    with evaluating(module, fused=True):
        return [tensor.float().cpu().numpy() for tensor in tensors(call(module, inputs))]


def compare_outputs(found: Sequence[np.ndarray], expected: Sequence[np.ndarray], *, tolerance: float) -> OutputCheck:
    """Largest and mean differences over all outputs, the mean relative to the standard deviation of each."""
    if len(found) != len(expected):
        raise VerificationError(f"the file has {len(found)} outputs, the module {len(expected)}. Was another model exported?")
    worst_mean, worst_max, agreement = 0.0, 0.0, 1.0
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.size != theirs.size:
            raise VerificationError(
                f"output {index} of the file has shape {ours.shape}, the module's {theirs.shape}. Was it exported from another "
                "model, or for inputs of another size?"
            )
        difference = np.abs(ours.reshape(theirs.shape).astype(np.float64) - theirs)
        spread = float(np.std(theirs, dtype=np.float64)) or 1.0
        mean = float(difference.mean()) / spread
        # A comparison with NaN is False, so a NaN would pass every tolerance: count it as infinitely far.
        worst_mean = max(worst_mean, mean if np.isfinite(mean) else np.inf)
        worst_max = max(worst_max, float(np.nan_to_num(difference, nan=np.inf).max()))
        if theirs.ndim == 2:
            same = ours.reshape(theirs.shape).argmax(axis=1) == theirs.argmax(axis=1)
            agreement = min(agreement, float(same.mean()))
    return OutputCheck(min(worst_mean, _NOT_FINITE), min(worst_max, _NOT_FINITE), agreement, tolerance)


def _budget_checks(
    model: nn.Module, inputs: Any, bits: BitConfig, found: BitConfig, costs: Iterable[AbstractCost | str] | AbstractCost | str
) -> tuple[BudgetCheck, ...]:
    from mpq_plugins.model.discover import find_layers

    recorded = bits.origin.get("budgets", ())
    layers = {layer: found.layers[layer.name] for layer in find_layers(model, inputs) if layer.name in found.layers}
    own = {cost.name: cost for cost in resolve_all("costs", costs)}
    return tuple(_budget_check(row, layers, own) for row in recorded)


def _budget_check(row: Any, layers: Mapping[Layer, Precision], own: Mapping[str, AbstractCost]) -> BudgetCheck:
    try:
        name, limit, unit = str(row["name"]), float(row["limit"]), str(row.get("unit", ""))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(f"the bit configuration records a budget that cannot be read: {row!r}. Allocate again.") from error
    try:
        cost: AbstractCost = own[name] if name in own else make("costs", name, row.get("options"))
    except PluginError:  # a cost that was given as an object
        return BudgetCheck(name, limit, None, unit)
    return BudgetCheck(name, limit, cost.total(layers), unit)
