"""First-order effects of every choice on every image, from one backward pass per piece of a batch."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from mpq_plugins.common.allocator import keeping_memory
from mpq_plugins.common.progress import track
from mpq_plugins.errors import ModelError
from mpq_plugins.model.run import Batch, call, evaluating, select, telling_failures, tensors
from mpq_plugins.model.watch import WEIGHTED, bias_argument, input_argument, weight_argument
from mpq_plugins.proxies.measuring.correction import ChangeOfOutput, Norm, Reference, correcting, output_axis
from mpq_plugins.proxies.measuring.effects import Effects, SensitivityRun, noise_of
from mpq_plugins.proxies.measuring.perturbation import AbstractCalls, Changes, Perturbation, run_changed
from mpq_plugins.proxies.measuring.trace import is_metadata


@keeping_memory()
def first_order_effects(lab: SensitivityRun) -> Effects:
    """`Effects` from directional derivatives: v = <dLoss_n/dy_i, change of y_i>, y_i being the output of unit i's layers.

    `losses` and `slopes` are the mean of v over images n, `curvature` is the mean of v v', the empirical Fisher information
    in the directions of the quantization errors (as in MPQCO and in NVIDIA ModelOpt's gradient scores, with cross terms).
    Without labels the derivative is that of a label drawn from the model's own distribution, and slopes are zero.
    """
    sums = lab.journal.kept("all-fisher-and-squares", lambda: _measure_all(lab))
    mean = {name: array / lab.n_images for name, array in sums.items()}
    facts = {"n_images": lab.n_images, "passes": "one forward and one backward pass"}
    noise = noise_of(mean, lab.n_images)
    slopes, curvature = mean["slopes"], mean["curvature"]
    return Effects(float(mean["base"]), slopes, slopes, curvature, None, facts, noise=noise)


def _measure_all(lab: SensitivityRun) -> dict[str, np.ndarray]:
    """Sums over all images, piece by piece."""
    n_choices = int(lab.start[-1])
    sums = {"base": np.asarray(0.0), "slopes": np.zeros(n_choices)}
    sums |= {name: np.zeros((n_choices, n_choices)) for name in ("curvature", "squares")}
    for index, batch in enumerate(track(lab.pieces(), "images forward and back")):
        arrays = lab.journal.kept(f"piece{index:05d}-fisher-and-squares", partial(_of_piece, lab, batch, index))
        sums = {name: sums[name] + arrays[name] for name in sums}
    return sums


@dataclass(frozen=True)
class CallGradient:
    """One call of a layer in a forward pass, and the derivative of every image's loss by its output."""

    layer: str
    function: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    gradient: Tensor
    correction: ChangeOfOutput | None = None

    def changed(self, lab: SensitivityRun, unit: int, choice: int) -> Tensor:
        """What `unit` at `choice` adds to the output of this call of one of its layers, after the correction if any."""
        [change] = lab.engine.variants.changes(unit, [choice], merged=False)[self.layer]
        if change.activation is None:  # The layer is linear, so the change of its weight alone gives the change of its output.
            delta = change.weight - weight_argument(self.args, self.kwargs)
            bias = bias_argument(self.args, self.kwargs)
            no_bias = None if bias is None else torch.zeros_like(bias)
            moved = run_changed(self.function, self.args, self.kwargs, [Perturbation(delta)], bias=no_bias)
        else:
            moved = run_changed(self.function, self.args, self.kwargs, [change]) - self._own
        return moved if self.correction is None else self.correction(moved)

    @cached_property
    def _own(self) -> Tensor:
        output: Tensor = self.function(*self.args, **self.kwargs)
        return output


@dataclass(frozen=True)
class Backward:
    """A forward and a backward pass of a piece of a batch; `base` is its summed loss."""

    base: float
    has_slope: bool
    calls: Sequence[CallGradient]


def backward(lab: SensitivityRun, batch: Batch, index: int) -> Backward:
    """The calls of all free layers on piece `index`, with their gradients.

    The derivative is that of the loss, or without labels that of a label drawn from the model's own distribution.
    """
    model, engine = lab.model, lab.engine
    layers = {name for unit in lab.free for name in lab.space.units[unit].layers}
    reference = engine.reference(batch) if engine.pinned else None
    taps = _Taps(engine.owner, layers, engine.changes(engine.pinned, merged=False), reference)
    with evaluating(model), engine.owner, telling_failures(model), torch.enable_grad(), taps:
        output = select(call(model, batch.inputs), engine.output)
    generator = lab.generator(index)
    at_base = lab.measure(output.detach(), batch, generator)
    with torch.enable_grad():
        base, loss = at_base.losses(output), at_base.probe(output, generator)
        gradients = taps.gradients(loss)
    calls = [
        replace(tap, gradient=gradient, correction=taps.correction(at) if engine.correction else None)
        for at, (tap, gradient) in enumerate(zip(taps.found, gradients, strict=True))
        if gradient is not None
    ]
    return Backward(float(base.detach().sum()), at_base.has_slope, calls)


@torch.no_grad()
def _of_piece(lab: SensitivityRun, batch: Batch, index: int) -> dict[str, np.ndarray]:
    done = backward(lab, batch, index)
    v = np.zeros((len(batch), int(lab.start[-1])))  # [image, choice]
    for made in done.calls:
        for unit, choice in lab.choices_of(made.layer):
            per_image = (made.changed(lab, unit, choice) * made.gradient).reshape(len(v), -1).sum(1, dtype=torch.float64)
            v[:, lab.start[unit] + choice] += per_image.cpu().numpy()
    slopes = v.sum(0) if done.has_slope else np.zeros(v.shape[1])
    squared = np.square(v)
    return {"base": np.asarray(done.base), "slopes": slopes, "curvature": v.T @ v, "squares": squared.T @ squared}


@final
class _Taps(AbstractCalls):
    def __init__(self, owner: Any, layers: set[str], pinned: Changes, reference: Reference | None) -> None:
        super().__init__()
        self.found: list[CallGradient] = []  # with offsets of zeros on the outputs, whose gradients are those of the outputs
        self._owner, self._layers, self._pinned = owner, layers, pinned
        self._corrected = correcting(reference, apart=True)
        self._readers = _Readers()
        self._versions: list[int] = []  # of the activation that each call has read

    def gradients(self, loss: Tensor) -> Sequence[Tensor | None]:
        """Of the sum of losses [N] by the output of every call. Raises `ModelError` when activations were written over."""
        for tap, version in zip(self.found, self._versions, strict=True):
            if input_argument(tap.args, tap.kwargs)._version != version:
                raise ModelError(
                    f"the model changes the activation that {tap.layer} has read in place, so its first-order effects "
                    "cannot be computed. Make that operation return a new tensor, or take a score that runs forward only."
                )
        return torch.autograd.grad(loss.sum(), [tap.gradient for tap in self.found], allow_unused=True) if self.found else ()

    def run(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self._readers.note(func, args, kwargs)
        layer: str = (self._owner.name(args, kwargs) if func in WEIGHTED else None) or ""
        if layer in self._pinned:
            return self._corrected(func, args, kwargs, _at_its_only_choice(func, args, kwargs, self._pinned[layer]))
        output = self._corrected(func, args, kwargs, func(*args, **kwargs))
        if layer not in self._layers:
            return output
        offset = torch.zeros_like(output, requires_grad=True)
        args = [value.detach() if isinstance(value, Tensor) else value for value in args]
        self._versions.append(input_argument(args, kwargs)._version)
        self.found.append(CallGradient(layer, func, args, kwargs, offset))
        moved = output + offset
        self._readers.watch(moved)
        return moved

    def correction(self, at: int) -> ChangeOfOutput | None:
        """What is left of a change of the output of call `at`; None where nothing next to it is corrected."""
        n_readers, norm, output = self._readers.of[at]
        tap = self.found[at]
        if norm is not None:
            return ChangeOfOutput(1, norm, output) if n_readers == 1 and output is not None else None
        return None if bias_argument(tap.args, tap.kwargs) is None else ChangeOfOutput(output_axis(tap.function))


@final
class _Readers:
    """How many calls read each watched tensor, and the norm among them with the tensor itself."""

    def __init__(self) -> None:
        self.of: list[tuple[int, Norm | None, Tensor | None]] = []
        self._watched: dict[int, tuple[weakref.ref[Tensor], int]] = {}

    def watch(self, value: Tensor) -> None:
        """Watch one more tensor."""
        self._watched[id(value)] = (weakref.ref(value), len(self.of))
        self.of.append((0, None, None))

    def note(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take down a call that is about to run."""
        if is_metadata(function):
            return
        for tensor in (*tensors(args), *tensors(kwargs)):
            reference, at = self._watched.get(id(tensor), (None, 0))
            if reference is None or reference() is not tensor:
                continue
            n_readers, norm, output = self.of[at]
            found = Norm.of(function, args, kwargs)
            self.of[at] = (n_readers + 1, norm, output) if found is None else (n_readers + 1, found[0], tensor.detach())


def _at_its_only_choice(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], changes: Sequence[Perturbation]) -> Tensor:
    """The call of a pinned layer; gradients go straight through the rounding of what it reads."""
    [change] = changes
    values: Tensor = input_argument(args, kwargs)
    if change.activation is not None:
        values = values + (change.activation(values.detach()) - values.detach())
    rest = args[1:] if args else ()
    return run_changed(func, (values, *rest), {k: v for k, v in kwargs.items() if k != "input"}, [Perturbation(change.weight)])
