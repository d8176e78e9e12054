"""What quantizing one unit, or two, does to the loss: the measurements behind every perturbation score."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from mpq_plugins.common.allocator import keeping_memory
from mpq_plugins.common.progress import track
from mpq_plugins.errors import DataError, FewImagesWarning, PluginError
from mpq_plugins.model.run import Batch, Output, joined
from mpq_plugins.proxies.features import first_images
from mpq_plugins.proxies.measuring.cache import MeasurementCache, digest_of_batches, digest_of_model, text_of_function
from mpq_plugins.proxies.measuring.correction import LEAST_IMAGES
from mpq_plugins.proxies.measuring.criteria import AbstractMeasure, Loss, measure
from mpq_plugins.proxies.measuring.engine import AbstractRun, Engine
from mpq_plugins.proxies.measuring.widths import filled, measured_choices
from mpq_plugins.space.space import Space


@final
@dataclass(frozen=True)
class MeasurementOptions:
    """How effects are measured: options shared by all scores that perturb weights or activations.

    `loss` is read by `measure` in `_criteria`; `output` selects the tensor that counts. Weights are quantized per output
    channel or per tensor; activations too, where the space lets units choose their bits. `memory_mb` bounds what is kept.
    `replay` and `folding` switch the two accelerations of the engine off, to compare.

    With `correction` quantized runs are corrected as adapters correct a prepared network: the statistics of batch
    normalisations and the biases of other layers move by what quantization did to them. They are those of the images that
    run together: a piece of a batch, as large as the memory allows but of `LEAST_IMAGES` at least; smaller batches are
    joined. With fewer images a correction is fitted to the very images that are measured, and losses come out low.
    The published definitions of scores have no correction; `correction=False` gives them.

    With `interpolate` losses alone are measured at some weight widths only (see `_widths`), and put in for the others.
    Raises `PluginError`.
    """

    loss: Loss = "auto"
    per_channel: bool = True
    n_images: int = 256
    n_samples: int = 0
    seed: int = 0
    output: Output = None
    memory_mb: int = 1024
    replay: bool = True
    folding: bool = True
    correction: bool = True
    interpolate: bool = False

    def __post_init__(self) -> None:
        for name in ("n_samples", "memory_mb"):
            if getattr(self, name) < 0:
                raise PluginError(f"{name} is {getattr(self, name)}, but cannot be negative. Leave it at its default.")


@final
@dataclass(frozen=True, eq=False)
class Effects:
    """Averages over the sensitivity set; the choices of all units stand in one row.

    `losses` is the loss with one unit at one choice less the base loss, `slopes` its first-order part and `curvature` the
    second-order terms, all around the float model (with units of a single choice at that choice). `pairs` is the loss with
    two units changed less the base loss and both single changes (CLADO's Omega), zero within a unit; None unless asked for.
    `slopes` and `curvature` are None where only losses were asked for. `noise` is the variance over images of each entry of
    `curvature`, divided by their number: the square of its standard error; None for a single image.
    `power` is the mean square of the base output; None where nobody looked.
    """

    base_loss: float
    losses: np.ndarray  # [choice]
    slopes: np.ndarray | None  # [choice]
    curvature: np.ndarray | None  # [choice, choice]
    pairs: np.ndarray | None  # [choice, choice]
    facts: Mapping[str, Any]
    power: float | None = None
    noise: np.ndarray | None = None  # [choice, choice]


@final
class SensitivityRun:
    """A model, a space and a sensitivity set, ready to be measured."""

    def __init__(self, model: nn.Module, space: Space, batches: Iterable[Any], setup: MeasurementOptions) -> None:
        self.model, self.space, self.setup = model, space, setup
        found = sensitivity_set(batches, setup.n_images)
        self.batches = joined(found, LEAST_IMAGES) if setup.correction else found
        self.start = np.concatenate([[0], np.cumsum([len(unit.choices) for unit in space.units])])

    @cached_property
    def engine(self) -> Engine:
        """What runs the model; made when something has to be measured."""
        names = ("output", "per_channel", "memory_mb", "replay", "folding", "correction")
        return Engine.start(self.model, self.space, self.batches[0], **{name: getattr(self.setup, name) for name in names})

    @property
    def n_images(self) -> int:
        """Images in the sensitivity set."""
        return sum(map(len, self.batches))

    @property
    def free(self) -> list[int]:
        """Units with a decision to make: the others are at their choice throughout."""
        return [index for index, unit in enumerate(self.space.units) if self.space.is_free(unit)]

    def choices_of(self, layer: str) -> list[tuple[int, int]]:
        """The unit of a layer with each of its choices."""
        unit = next(index for index, members in enumerate(self.space.units) if layer in members.layers)
        return [(unit, choice) for choice in range(len(self.space.units[unit].choices))]

    @keeping_memory()
    def effects(self, *, pairs: bool = False, curvature: bool = True) -> Effects:
        """Measure every choice of every unit, and with `pairs` every two of them. Takes up what the journal holds.

        Without `curvature` only losses are measured, which keeps no outputs. Raises `DataError` when the output is not finite
        with some unit quantized.
        """
        what = _What(pairs, curvature)
        sums = self.journal.get(f"all-{what}")
        if sums is None and not curvature:  # What was measured with it holds the losses too.
            sums = self.journal.get(f"all-{replace(what, curvature=True)}")
        sums = sums or self.journal.kept(f"all-{what}", lambda: self._measure_all(what))
        mean = {name: sums[name] / self.n_images for name in sums}
        facts = {
            "n_images": self.n_images,
            "passes": "replayed from a tape" if int(sums["replayed"]) else "plain forward passes",
            "layer_evaluations": int(sums["evaluations"]),
        }
        return Effects(
            float(mean["base"]),
            mean["losses"],
            mean["slopes"] if curvature else None,
            mean["curvature"] if curvature else None,
            mean.get("pairs"),
            facts,
            float(mean["power"]),
            noise_of(mean, self.n_images),
        )

    def _filled(self, losses: np.ndarray) -> np.ndarray:
        """Losses [choice] with those put in that are not measured."""
        found: np.ndarray = losses.copy()
        for unit in self.free:
            row = slice(self.start[unit], self.start[unit + 1])
            found[row] = filled(self.space.units[unit], losses[row], partial(self._squared_error, unit))
        return found

    def _squared_error(self, unit: int, bits: int) -> float:
        layers = self.space.weights(self.space.units[unit]).values()
        return sum(float(self.engine.variants.delta(layer, bits).square().sum()) for layer in layers)

    def _measure_all(self, what: _What) -> dict[str, np.ndarray]:
        """Sums over all images, piece by piece."""
        sums: dict[str, np.ndarray] = {}
        pieces = self.pieces()
        steps = [(piece, unit) for piece in range(len(pieces)) for unit in (*self.free, None)]
        run: _PieceRun | None = None
        for piece, unit in track(steps, "units through the model, pair by pair" if what.pairs else "units through the model"):
            done = self.journal.get(f"piece{piece:05d}-{what}")
            if done is None:
                run = run if run is not None and run.piece == piece else _PieceRun(self, piece, pieces[piece], what)
                if unit is not None:
                    run.measure(unit)
                    continue
                done = run.finish()
            if unit is None:
                keys = [what.key(piece, unit) for unit in self.free]  # a killed run may have left some
                self.journal.drop([*keys, *(key + "-pairs" for key in keys)])
                sums = {name: sums.get(name, 0) + array for name, array in done.items()}
        return {**sums, "losses": self._filled(sums["losses"]), "replayed": np.asarray(int(self.engine.player is not None))}

    @keeping_memory()
    def losses_at(self, choices: Sequence[Sequence[int]]) -> list[float]:
        """The mean loss over the sensitivity set with every unit quantized, for each list of one choice per unit.

        Raises `DataError` when a loss is not finite.
        """
        keys = [f"at-{hashlib.sha256(repr(list(map(int, choice))).encode()).hexdigest()[:20]}" for choice in choices]
        held = [self.journal.get(key) for key in keys]
        losses = [0.0 if found is None else float(found["loss"]) for found in held]
        missing = [at for at, found in enumerate(held) if found is None]
        if missing:
            totals = np.zeros(len(missing))
            for index, batch in track(list(enumerate(self.pieces())), "plans through the model"):
                at_base = self.measure(self.engine.run(batch).output, batch, self.generator(index))
                reference = self.engine.reference(batch)
                for row, at in enumerate(missing):
                    totals[row] += float(at_base.losses(self.engine.quantized(batch, choices[at], reference)).sum())
            if not np.isfinite(totals).all():
                raise DataError(
                    f"the loss of {int((~np.isfinite(totals)).sum())} of {len(totals)} quantized plans is not finite. Run the "
                    "model in float32, or do without measuring plans (top_k=1)."
                )
            for row, at in enumerate(missing):
                losses[at] = float(totals[row] / self.n_images)
                self.journal.put(keys[at], {"loss": np.asarray(losses[at])})
        return losses

    @cached_property
    def journal(self) -> MeasurementCache:
        """Where measurements are kept."""
        return MeasurementCache(
            {
                "model": digest_of_model(self.model),
                "data": digest_of_batches(self.batches),
                "batches": list(map(len, self.batches)),
                "space": self.space.to_json(),
                "setup": described(self.setup),
                "functions": [text_of_function(value) for value in (self.setup.loss, self.setup.output) if callable(value)],
            }
        )

    def generator(self, index: int) -> torch.Generator:
        """The random numbers of piece `index`."""
        return torch.Generator().manual_seed(self.setup.seed + index)

    def measure(self, base: Tensor, batch: Batch, generator: torch.Generator) -> AbstractMeasure:
        """The loss around the base output of a piece."""
        return measure(self.setup.loss, base, batch, n_samples=self.setup.n_samples, generator=generator)

    def pieces(self) -> list[Batch]:
        """The sensitivity set in pieces whose kept values fit into the memory."""
        return [piece for batch in self.batches for piece in self.engine.pieces(batch)]


@final
@dataclass(frozen=True)
class _What:
    """What is measured, told apart by its text in the journal."""

    pairs: bool
    curvature: bool

    def __str__(self) -> str:
        return ("pairs" if self.pairs else "sums") + ("-and-squares" if self.curvature else "-of-losses")

    def key(self, piece: int, unit: int) -> str:
        """The name of a unit's own measurements on a piece."""
        kind = "" if self.curvature else "-all-losses" if self.pairs else "-losses"  # the last may be of some choices only
        return f"piece{piece:05d}-unit{unit:04d}{kind}"


@final
class _PieceRun:
    """The measurements of one piece of a batch, unit by unit, kept in the journal as they are made."""

    def __init__(self, lab: SensitivityRun, piece: int, batch: Batch, what: _What) -> None:
        self.piece, self._lab, self._batch, self._what = piece, lab, batch, what

    def measure(self, unit: int) -> None:
        """Measure one unit unless the journal has it."""
        self._kept(unit, self._singles)
        if self._what.pairs:
            self._kept(unit, self._joint, "-pairs")

    def _kept(self, unit: int, measure: Callable[[int], dict[str, np.ndarray]], suffix: str = "") -> dict[str, np.ndarray]:
        """What `measure` gives, with the layer evaluations that it took, from the journal where that has it."""

        def counted() -> dict[str, np.ndarray]:
            counter = self._lab.engine.counter
            before = counter.run
            return {**measure(unit), "evaluations": np.asarray(counter.run - before)}

        return self._lab.journal.kept(self._what.key(self.piece, unit) + suffix, counted)

    def finish(self) -> dict[str, np.ndarray]:
        """The sums over the piece's images, kept in place of the units' own arrays."""
        lab, n_choices = self._lab, int(self._lab.start[-1])
        found = {unit: self._kept(unit, self._singles) for unit in lab.free}
        sums = {"losses": np.zeros(n_choices)}
        sums["evaluations"] = np.asarray(sum(int(arrays["evaluations"]) for arrays in found.values()))
        run, at_base = self._started
        base = float(at_base.losses(run.output).sum())
        for unit, arrays in found.items():
            sums["losses"][lab.start[unit] : lab.start[unit + 1]] = arrays["losses"] - base
        power = float(run.output.flatten(1).double().square().mean(1).sum())
        sums |= {"base": np.asarray(base), "power": np.asarray(power)}
        if self._what.curvature:
            sums |= self._second_order(found)
        if self._what.pairs:
            joint = {unit: self._kept(unit, self._joint, "-pairs") for unit in lab.free}
            sums["pairs"] = self._omega(joint, sums["losses"], base)
            sums["evaluations"] = sums["evaluations"] + sum(int(arrays["evaluations"]) for arrays in joint.values())
        lab.journal.put(f"piece{self.piece:05d}-{self._what}", sums)
        return sums

    def _second_order(self, found: Mapping[int, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Slopes [choice], curvature [choice, choice] and the squares of what each image adds to it."""
        lab, n_choices = self._lab, int(self._lab.start[-1])
        slopes = np.zeros(n_choices)
        features = np.zeros((n_choices, max((arrays["features"].shape[1] for arrays in found.values()), default=0)))
        for unit, arrays in found.items():
            row = slice(lab.start[unit], lab.start[unit + 1])
            slopes[row], features[row] = arrays["slopes"], arrays["features"]
        of_images = features.reshape(n_choices, len(self._batch), -1)
        squares = np.zeros((n_choices, n_choices))
        for image in range(len(self._batch)):
            squares += np.square(of_images[:, image] @ of_images[:, image].T)
        return {"slopes": slopes, "curvature": features @ features.T, "squares": squares}

    def _singles(self, unit: int) -> dict[str, np.ndarray]:
        run, at_base = self._started
        members = self._lab.space.units[unit]
        losses_only = not self._what.curvature and not self._what.pairs
        is_sparse = losses_only and self._lab.setup.interpolate
        choices = measured_choices(members) if is_sparse else range(len(members.choices))
        losses = np.full(len(members.choices), np.nan)
        found: dict[str, list[Any]] = {"slopes": [], "features": []}
        for choice, output in zip(choices, self._finite(unit, choices, run.single(unit, choices)), strict=True):
            losses[choice] = float(at_base.losses(output).sum())
            if self._what.curvature:
                found["slopes"].append(float(at_base.slopes(output).sum()))
                found["features"].append(at_base.features(output).flatten().float().cpu().numpy())
        return {"losses": losses, **{name: np.asarray(values) for name, values in found.items() if values}}

    def _joint(self, unit: int) -> dict[str, np.ndarray]:
        """Losses with both changed [choice of the unit, choice of all units], NaN for units up to this one."""
        lab = self._lab
        run, at_base = self._started
        joint = np.full((len(lab.space.units[unit].choices), int(lab.start[-1])), np.nan)
        later = [other for other in lab.free if other > unit]
        for choice in range(len(joint)) if later else ():
            under = run.under(unit, choice)
            for other in later:
                every = range(len(lab.space.units[other].choices))
                outputs = self._finite(other, every, under.single(other, every))
                losses = [float(at_base.losses(output).sum()) for output in outputs]
                joint[choice, lab.start[other] : lab.start[other + 1]] = losses
        return {"joint": joint}

    def _omega(self, found: Mapping[int, Mapping[str, np.ndarray]], losses: np.ndarray, base: float) -> np.ndarray:
        lab = self._lab
        omega = np.zeros((len(losses), len(losses)))
        for unit, arrays in found.items():
            joint = arrays["joint"]
            rows = slice(lab.start[unit], lab.start[unit + 1])
            change = joint - base - losses[rows, None] - losses[None, :]
            omega[rows] = np.where(np.isnan(joint), 0.0, change)
        both: np.ndarray = omega + omega.T
        return both

    def _finite(self, unit: int, choices: Sequence[int], outputs: Iterable[Tensor]) -> Iterator[Tensor]:
        members = self._lab.space.units[unit]
        for choice, output in zip(choices, outputs, strict=True):
            if not bool(output.isfinite().all()):
                raise DataError(
                    f"the output is not finite with {members.name} at {members.choices[choice]}, though it is with the float "
                    "model. Exclude the layer, or leave this precision out of its menu."
                )
            yield output

    @cached_property
    def _started(self) -> tuple[AbstractRun, AbstractMeasure]:
        run = self._lab.engine.run(self._batch)
        return run, self._lab.measure(run.output, self._batch, self._lab.generator(self.piece))


def noise_of(mean: Mapping[str, np.ndarray], n_images: int) -> np.ndarray | None:
    """`noise` of `Effects`, from means over images of the curvature and of its squares; None where they say nothing."""
    if n_images < 2 or "squares" not in mean:
        return None
    noise: np.ndarray = np.maximum(mean["squares"] - np.square(mean["curvature"]), 0.0) / (n_images - 1)
    return noise


def sensitivity_set(batches: Iterable[Any], n_images: int) -> list[Batch]:
    """The first `n_images` images. Raises `DataError` when there is none."""
    found = list(first_images(batches, n_images))
    if sum(map(len, found)) < 2:
        warnings.warn("the score is measured on one image, which says little: give 32 or more.", FewImagesWarning, stacklevel=3)
    return found


def described(options: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain JSON values: functions by their names."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}
    return {
        name: value
        if value is None or isinstance(value, (bool, int, float, str))
        else f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
        for name, value in values.items()
    }
