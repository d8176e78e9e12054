"""Repairs after quantization, each kept only where it brings the outputs nearer to those of the float network."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.record import record, recorded_fact
from mpq_plugins.model.quick import quick
from mpq_plugins.model.run import Batch, are_class_logits, call, evaluating, tensors
from mpq_plugins.quantizers.batch_norm import AbstractSite, Recorded, correct_by_difference
from mpq_plugins.space.bits import BitConfig

_LOG = logging.getLogger("mpq_plugins.ptq")
_OF_NORMS, _OF_BIASES = "batch_norm=corrected", "bias_correction=true"
_FINE, _ENOUGH = 8, 64  # bits of weights, and the images that tell what those do
_LEAST_IMAGES = 16  # of which some can be held back
_SHARE = 8  # one image in so many, at most


@dataclass(frozen=True)
class Repair:
    """What one option of `PTQ` was worth: the distance to the float network before and after, on held-out images.

    `metric` is "KL divergence" for class logits (a single output [N, class]), else "relative squared error" of all outputs.
    """

    option: str  # such as "batch_norm=corrected", or two that were judged together
    metric: str
    before: float
    after: float
    kept: bool
    n_images: int

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "not kept"
        return (
            f"{self.option}: {self.metric} {self.before:.4g} -> {self.after:.4g} on {self.n_images} held-out images, {verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return asdict(self)


@final
class Judge:
    """Measures how far a module's outputs are from the float network's on held-out images."""

    def __init__(self, model: nn.Module, held_out: Sequence[Batch]) -> None:
        self._batches = held_out
        self._expected = _outputs(model, held_out)
        self.n_images = sum(map(len, held_out))
        of_classes = all(len(outputs) == 1 and are_class_logits(outputs[0]) for outputs in self._expected)
        self.metric = "KL divergence" if of_classes else "relative squared error"

    def distance(self, module: nn.Module) -> float:
        """Mean KL(float || module) in nats, or squared error over the float outputs' power; infinity where not finite."""
        found = _outputs(module, self._batches)
        pairs = [pair for ours, theirs in zip(found, self._expected, strict=True) for pair in zip(ours, theirs, strict=True)]
        if self.metric == "KL divergence":
            value = sum(_divergence(theirs, ours) for ours, theirs in pairs) / self.n_images
        else:
            power = sum(float(theirs.square().sum()) for _, theirs in pairs)
            value = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs) / max(power, 1e-30)
        return value if value == value else float("inf")


def _outputs(module: nn.Module, batches: Sequence[Batch]) -> list[list[Tensor]]:
    with evaluating(module):
        found = (tensors(call(module, batch.inputs)) for batch in batches)
        return [[tensor.double() for tensor in outputs if tensor.is_floating_point()] for outputs in found]


def _divergence(expected: Tensor, found: Tensor) -> float:
    log_p, log_q = expected.log_softmax(1), found.log_softmax(1)
    return float((log_p.exp() * (log_p - log_q)).sum())


def hold_out(batches: Sequence[Batch], most: int) -> tuple[list[Batch], list[Batch]]:
    """The batches to repair with, and those to judge by: up to `most` images, spread over all batches, an eighth at most.

    With fewer than 16 images, or `most` 0, none are held back.
    """
    n_images = sum(map(len, batches))
    n_held = min(most, n_images // _SHARE) if n_images >= _LEAST_IMAGES else 0
    used, held, seen = [], [], 0
    for batch in batches:
        before, seen = seen * n_held // n_images, seen + len(batch)
        cut = len(batch) - (seen * n_held // n_images - before)
        used += [batch.part(0, cut)] if cut else []
        held += [batch.part(cut, len(batch))] if cut < len(batch) else []
    return used, held


@dataclass(frozen=True)
class Images:
    """Calibration images: all as they were given, those to repair with, and these and the held-out ones for quick passes."""

    given: tuple[Batch, ...]
    used: Sequence[Batch]
    quick_used: Sequence[Batch]
    quick_held: Sequence[Batch]

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[Batch], n_held: int) -> Images:
        """`batches` with up to `n_held` images held out."""
        used, held = hold_out(batches, n_held)
        longest = max(map(len, batches))
        return cls(tuple(batches), used, *(quick(model, part, longest=longest) for part in (used, held)))

    @property
    def quick(self) -> tuple[Batch, ...]:
        """All, for quick passes."""
        return (*self.quick_used, *self.quick_held)


def are_fine(bits: BitConfig) -> bool:
    """Whether no weight has less than 8 bits: then few images tell what quantization moves."""
    return all(precision.weight >= _FINE for precision in bits.layers.values())


def to_correct_with(batches: Sequence[Batch], bits: BitConfig) -> Sequence[Batch]:
    """The first of `batches` with enough images to measure corrections: all, or 64 for weights of 8 bits.

    EfficientNet-Lite0 at w8a8, KL to the float network: 0.0074 with 112 images, 0.0079 with 64, 0.0113 with 32.
    """
    if not are_fine(bits):
        return batches
    n_images = 0
    for index, batch in enumerate(batches):
        if n_images >= _ENOUGH:
            return batches[:index]
        n_images += len(batch)
    return batches


@torch.no_grad()
def repair(
    module: nn.Module,
    ptq: PTQ,
    batches: Sequence[Batch],
    judge: Judge | None,
    *,
    reference: nn.Module,
    norms: Callable[[], Mapping[str, AbstractSite]],
    biases: Callable[[], Mapping[str, AbstractSite]],
    reestimate: Callable[[], Any],
    expected: Recorded | None = None,
    correcting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> list[Repair]:
    """Repair batch normalisation and biases of `module` in place as `ptq` says; see `correct_by_difference`.

    `norms` and `biases` give the sites of both, `reestimate` gives normalisations the statistics of the images. Corrections are
    judged together, and one by one only where that does not help; without a `judge` everything is kept. `expected` are the
    moments of `reference` on the batches, where they are known. `correcting` surrounds the passes that measure corrections.
    """

    def correct(sites: Mapping[str, AbstractSite]) -> None:
        with correcting():
            correct_by_difference(reference, module, batches, sites, expected=expected)

    done = _Repaired(module, judge)
    if ptq.batch_norm == "re-estimated":
        done.attempt("batch_norm=re-estimated", reestimate)
    of_norms = norms() if ptq.batch_norm == "corrected" else {}
    of_biases = biases() if ptq.bias_correction else {}
    # Both in one pass, as biases are measured behind the normalisations.
    correct({**of_norms, **of_biases})
    moved = {name: site for name, site in of_biases.items() if site.shift is not None}  # layers of tokens have none
    if of_norms and moved and done.judged(f"{_OF_NORMS}, {_OF_BIASES}", only_if_kept=True):
        return done.repairs
    if of_norms:
        _undo(moved)
        if not done.judged(_OF_NORMS):
            _undo(of_norms)
            of_biases = biases() if moved else {}
            correct(of_biases)
            moved = {name: site for name, site in of_biases.items() if site.shift is not None}
    if moved:
        for site in moved.values():
            site.finish()
        if not done.judged(_OF_BIASES):
            _undo(moved)
    return done.repairs


def _undo(sites: Mapping[str, AbstractSite]) -> None:
    for site in sites.values():
        site.undo()


@final
class _Repaired:
    """The repairs of one module so far, and its distance from the float network."""

    def __init__(self, module: nn.Module, judge: Judge | None) -> None:
        self.repairs: list[Repair] = []
        self._module, self._judge = module, judge
        self._distance = 0.0 if judge is None else judge.distance(module)

    def attempt(self, option: str, change: Callable[[], Any]) -> None:
        """Change the module, and change it back where that does not help."""
        before = {name: tensor.detach().clone() for name, tensor in _tensors_of(self._module).items()}
        change()
        if not self.judged(option):
            with torch.no_grad():
                for name, tensor in _tensors_of(self._module).items():
                    tensor.copy_(before[name])

    def judged(self, option: str, *, only_if_kept: bool = False) -> bool:
        """Whether the module is now no farther from the float network than before; notes the figures, or only good ones."""
        if self._judge is None:
            return True
        after = self._judge.distance(self._module)
        made = _compared(option, self._judge, self._distance, after)
        if made.kept or not only_if_kept:
            self.repairs.append(made)
            note(made)
        if made.kept:
            self._distance = after
        return made.kept


def _compared(option: str, judge: Judge, before: float, after: float) -> Repair:
    """What an option did; of a network that is broken before and after, nothing is kept."""
    return Repair(option, judge.metric, before, after, after <= before and math.isfinite(after), judge.n_images)


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def note(made: Repair) -> None:
    """Log a repair: as a warning where it does not help."""
    _LOG.log(logging.INFO if made.kept else logging.WARNING, "%s", made)


def keep_what_helps(
    model: nn.Module, images: Images, ptq: PTQ, quantized: Callable[[PTQ, Judge | None], tuple[nn.Module, list[Repair]]]
) -> tuple[nn.Module, PTQ]:
    """What `quantized` makes of `model` with the options of `ptq`, less those that take it farther from the float network.

    Rounding and equalization are judged by quantizing without them too, on held-out images where there are some. The module
    remembers its repairs.
    """
    judge = Judge(model, images.quick_held) if images.quick_held else None
    module, repairs = quantized(ptq, judge)
    for option, plain in (("rounding", "nearest"), ("equalization", "none")):
        if judge is not None and getattr(ptq, option) != plain:
            without: PTQ = replace(ptq, **{option: plain})  # type: ignore[arg-type]  # the name is a field's
            simpler, of_simpler = quantized(without, judge)
            before, after = judge.distance(simpler), judge.distance(module)
            made = _compared(f"{option}={getattr(ptq, option)}", judge, before, after)
            note(made)
            module, repairs, ptq = (module, repairs, ptq) if made.kept else (simpler, of_simpler, without)
            repairs = [*repairs, made]
    return record(module, repairs=tuple(repairs)), ptq


def repairs_of(module: nn.Module) -> tuple[Repair, ...]:
    """What the repairs of a prepared `module` were worth; empty where none was judged, and for loaded modules.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4))
        >>> q = mpq.quantize(model, torch.randn(32, 16), budgets="size=w4", adapter="brevitas")
        >>> [repair.option for repair in mpq.repairs_of(q.module)]
        ['bias_correction=true']
    """
    return recorded_fact(module, "repairs") or ()
