"""Contract suites: what every proxy, cost, solver and adapter promises. Run them on your own plug-ins too.

A check returns nothing, or raises `AssertionError` with the first promise that is broken. In a test file:

    from mpq_plugins.testing import check_cost

    def test_my_cost():
        check_cost(MyCost())
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from mpq_plugins.adapter.base import AbstractAdapter, adapter_of, bits_of
from mpq_plugins.adapter.verify import verify
from mpq_plugins.allocation import build_space
from mpq_plugins.costs.base import AbstractCost
from mpq_plugins.errors import AdapterError, DataError, FingerprintError, FormatError, MPQError, UnknownLayerError
from mpq_plugins.model.discover import find_layers
from mpq_plugins.model.layers import Inventory, Layer
from mpq_plugins.model.run import Batch, call, evaluating, tensors
from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.problem import Problem
from mpq_plugins.solvers.solution import Solution, Status
from mpq_plugins.solvers.solve import solve
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision, menu
from mpq_plugins.space.space import Space

_EVERY = menu(range(1, 9), range(2, 9))

# Proxies --------------------------------------------------------------------------------------------------------------------


def check_proxy(
    proxy: AbstractProxy, *, model: nn.Module | None = None, batches: Iterable[Any] = (), space: Space | None = None
) -> None:
    """Check that a proxy gives usable scores and leaves the model alone.

    Its scores are finite, one for each choice, equal for equal data, and can be saved. The model's tensors, modes, hooks,
    gradients and the random numbers stay as they were. Data or labels that it needs and does not get are a `DataError`; one
    image is enough, or an error of ours. Name and options make the same proxy again.

    Args:
        proxy: what is checked.
        model: a small float network; one of ours if left out, with two batches of images and labels.
        batches: what the proxy looks at, with labels; to be given with a model.
        space: the decisions to score; precisions of 2, 4 and 8 bits for the layers of the model if left out.

    Raises:
        AssertionError: with the promise that is broken.

    Example:
        >>> from mpq_plugins.proxies import WeightError
        >>> check_proxy(WeightError())
    """
    told = f"the proxy {proxy.name}"
    data = list(map(Batch.of, batches)) or example_batches()
    model = example_network() if model is None else model
    space = _space(model, data[0].part(0, 1).inputs) if space is None else space
    found = []
    for training in (False, True):
        model.train(training)
        numbers = _random_numbers()
        with _unchanged(model, told):
            found.append(_score(proxy, model, space, data))
        _require(_random_numbers() == numbers, f"{told} draws from the random numbers of others")
    first, second = found
    _require(first.loss == second.loss, f"{told} scores the same images otherwise the second time, in training mode")
    _require(first.space.layers == space.layers, f"{told} scores other layers than those of the space it was given")
    for unit, row in zip(first.space.units, first.loss, strict=True):
        _require(len(row) == len(unit.choices), f"{told} gives {len(row)} losses for the {len(unit.choices)} of {unit.name}")
        _require(all(map(math.isfinite, row)), f"{told} gives losses that are not finite: {list(row)} for {unit.name}")
    with tempfile.TemporaryDirectory() as folder:
        read = Scores.load(first.save(Path(folder) / "scores.json"))
    same = (read.loss, read.space, dict(read.proxy), read.facts) == (
        *(first.loss, first.space, json.loads(json.dumps(dict(first.proxy)))),
        json.loads(json.dumps(first.facts)),
    )
    _require(same, f"scores of {told} differ after they were saved and loaded")
    _check_recipe(proxy, told)
    if proxy.needs_data:
        _must_raise(DataError, lambda: _score(proxy, model, space, ()), f"{told} without images")
    else:
        _require(_score(proxy, model, space, ()).loss == first.loss, f"{told} needs no data, but scores otherwise without")
    if proxy.needs_labels:
        bare = [replace(batch, labels=None) for batch in data]
        _must_raise(DataError, lambda: _score(proxy, model, space, bare), f"{told} without labels")
    with contextlib.suppress(MPQError):
        _score(proxy, model, space, [data[0].part(0, 1)])


def _score(proxy: AbstractProxy, model: nn.Module, space: Space, batches: Sequence[Batch]) -> Scores:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = proxy.score(model, space, batches)
    _require(isinstance(scores, Scores), f"the proxy {proxy.name} returned a {type(scores).__name__}, not Scores")
    return scores


def _check_recipe(proxy: AbstractProxy, told: str) -> None:
    options = proxy.recipe()
    _require(options.pop("name", None) == proxy.name, f"the recipe of {told} lacks its name")
    if all(getattr(proxy, name) == value for name, value in options.items()):  # functions stand there by their names
        _require(type(proxy)(**options) == proxy, f"the options {options} make another proxy than {proxy!r}")


# Costs ----------------------------------------------------------------------------------------------------------------------


def check_cost(cost: AbstractCost, *, model: nn.Module | None = None, example: Any = None) -> None:
    """Check that a cost is a number that follows from the facts of a layer and a precision alone.

    It is finite and not negative wherever the cost does not refuse (by an error of ours), the same for a copy of the facts,
    and adds up to the cost of the whole as `reduce` says. A size, in bytes and summed, counts a shared weight once: the bits
    of the second layer that holds it change nothing.

    Args:
        cost: what is checked.
        model: a network whose layers are asked for; one of ours with a shared weight if left out.
        example: an input as that model takes it.

    Raises:
        AssertionError: with the promise that is broken.

    Example:
        >>> from mpq_plugins.costs import WeightSize
        >>> check_cost(WeightSize())
    """
    told = f"the cost {cost.name}"
    _require(bool(cost.name) and isinstance(cost.unit, str), f"{told} has no name or no unit")
    model, example = (example_network(shared=True), example_batches()[0].inputs) if model is None else (model, example)
    layers = list(find_layers(model, example))
    costs = {(layer, own): _cost(cost, layer, own, told) for layer in layers for own in _EVERY}
    known = {place: value for place, value in costs.items() if value is not None}
    _require(bool(known), f"{told} refuses every layer and precision")
    for (layer, precision), value in known.items():
        where = f"{layer.name} at {precision}"
        _require(math.isfinite(value) and value >= 0, f"{told} of {where} is {value}, not a finite amount of at least 0")
        copied = Layer.from_json(json.loads(json.dumps(layer.to_json())))
        _require(_cost(cost, copied, precision, told) == value, f"{told} of {where} is another one for a copy of the layer")
    for precision in _EVERY:
        row = {layer: known[layer, precision] for layer in layers if (layer, precision) in known}
        if len(row) == len(layers):
            whole = math.fsum(row.values()) if cost.reduce == "sum" else max(row.values())
            total = cost.total(dict.fromkeys(row, precision))
            _require(
                math.isclose(total, whole), f"{told} of the whole network at {precision} is {total}, but {whole} by layers"
            )
    if cost.unit == "B" and cost.reduce == "sum":
        for layer in layers:
            amounts = {value for (own, _), value in known.items() if own == layer}
            counted = layer.shares_weight_with is None or len(amounts) < 2
            _require(counted, f"{told} counts the weight of {layer.name} again, which is that of {layer.shares_weight_with}")


def _cost(cost: AbstractCost, layer: Layer, precision: Precision, told: str) -> float | None:
    try:
        value = cost.of(layer, precision)
    except MPQError:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    _require(number, f"{told} of {layer.name} at {precision} is {value!r}, which is no number")
    return float(value)


# Solvers --------------------------------------------------------------------------------------------------------------------


def check_solver(solver: AbstractSolver, *, exact: bool = True, seeds: Iterable[int] = range(24)) -> None:
    """Compare a solver with every plan of small random problems: linear and pairwise, linked, infeasible, with up to 3 limits.

    Its plans meet the limits, none is better than the best, no bound is above it, "optimal" and "infeasible" are true, and
    the same problem has the same answer again. Problems that it refuses by an error of ours are left out, unless it refuses
    all.

    Args:
        solver: what is checked.
        exact: whether it must prove the optimum of every problem that it takes; False for heuristics.
        seeds: of `random_problem`; each gives four problems.

    Raises:
        AssertionError: with the promise that is broken and the problem.

    Example:
        >>> from mpq_plugins.solvers import LocalSearch
        >>> check_solver(LocalSearch(), exact=False, seeds=range(2))
    """
    judge, taken = _Refusing(solver), 0
    for seed in seeds:
        for n_limits in range(4):
            problem = random_problem(seed, n_limits, pairwise=seed % 3 == 2)
            told = f"the solver {solver.name} on random_problem({seed}, {n_limits}, pairwise={seed % 3 == 2})"
            try:
                found = solve(problem, judge, throw=False, n_next=0)
            except MPQError as error:
                _require(judge.refused, f"{told}: {error}")
                continue
            taken += 1
            _check_answer(problem, found, told, exact=exact)
            if seed % 8 == 0:
                again = solve(problem, judge, throw=False, n_next=0)
                _require(again.choice == found.choice, f"{told} gives {found.choice}, and {again.choice} the second time")
    _require(taken > 0, f"the solver {solver.name} refuses every problem")


class _Refusing(AbstractSolver):
    """Knows whether an error is the solver's own or tells that its answer is wrong."""

    def __init__(self, solver: AbstractSolver) -> None:
        self.name, self.refused, self._solver = solver.name, False, solver  # type: ignore[misc]  # of one solver each

    def solve(self, problem: Problem) -> Solution:
        self.refused = True
        answer = self._solver.solve(problem)
        self.refused = False
        return answer


def _check_answer(problem: Problem, found: Solution, told: str, *, exact: bool) -> None:
    best = _least(problem)
    slack = 1e-8 * max(float(np.ptp(problem.loss)) or 1.0, abs(best) if math.isfinite(best) else 0.0)
    if found.has_plan:
        _require(problem.is_feasible(found.choice), f"{told} breaks a limit or a cluster with {found.choice}")
        _require(found.objective >= best - slack, f"{told} says the loss {found.objective}, but the least is {best}")
        _require(found.bound <= best + slack, f"{told} says the bound {found.bound}, but {best} can be reached")
    if found.status is Status.optimal:
        _require(found.objective <= best + slack, f"{told} says {found.objective} is optimal, but {best} can be reached")
    elif found.status is Status.infeasible:
        _require(math.isinf(best), f"{told} says infeasible, but a plan of loss {best} meets every limit")
    elif exact:
        _fail(f"{told} gives {found.status.name}, but it was to prove that the optimum is {best}")


def _least(problem: Problem) -> float:
    """The least loss of all plans, tried one by one; infinite where none meets the limits."""
    sizes = np.diff(problem.start).tolist()
    plans = np.indices(sizes).reshape(problem.n_units, -1).T + problem.start[:-1]  # [plan, unit] of columns
    fits = np.ones(len(plans), dtype=bool)
    for limit in problem.limits:
        fits &= limit.cost[plans].sum(1) <= limit.limit * (1 + 1e-12)
    for cluster in np.unique(problem.cluster):
        labels = problem.width[plans[:, problem.cluster == cluster]]
        fits &= (labels == labels[:, :1]).all(1)
    plans = plans[fits]
    loss = problem.loss[plans].sum(1)
    if problem.pairwise is not None:
        loss = loss + 0.5 * problem.pairwise[plans[:, :, None], plans[:, None, :]].sum((1, 2))
    return float(loss.min(initial=math.inf))


KINDS = ("plain", "tiny losses", "ties", "huge costs", "large losses", "whole costs", "free choices", "duplicates")


def random_problem(seed: int, n_limits: int, *, pairwise: bool = False) -> Problem:
    """A small problem: 1 to 7 units of 1 to 4 choices, half of the time linked in groups, limits from tight to loose.

    Losses have both signs and with `pairwise` those of pairs, costs need not grow with the choices, and the `n_limits` limits
    may contradict each other. `seed` also picks one of `KINDS`. Choices are named like precisions.

    Example:
        >>> len(random_problem(3, n_limits=1).limits)
        1
    """
    rng = np.random.default_rng([seed, n_limits])
    kind = KINDS[seed % len(KINDS)]
    sizes = rng.integers(1, 5, int(rng.integers(1, 8)))
    loss = [_losses(rng, kind, size) for size in sizes]
    costs = []
    for _ in range(n_limits):
        table = [_costs(rng, kind, size) for size in sizes]
        least, most = sum(row.min() for row in table), sum(row.max() for row in table)
        costs.append((table, float(least + (most - least) * rng.uniform(0.05, 0.9))))
    if kind == "duplicates":
        loss = [np.repeat(row, 2)[: len(row)] for row in loss]
        costs = [([np.repeat(row, 2)[: len(row)] for row in table], limit) for table, limit in costs]
    cluster: Any = rng.integers(0, len(sizes) // 2 + 1, len(sizes)) if seed % 2 else None
    tables: tuple[Any, Any] = loss, costs
    problem = Problem.of(*tables, cluster=cluster, width=[[at % 2 for at in range(size)] for size in sizes])
    names = tuple(f"w{2 + int(index)}a{4 + 4 * (int(index) % 2)}" for index in problem.choices)
    pairs = rng.normal(size=(len(names), len(names))) * (float(np.ptp(problem.loss)) or 1.0)
    pairs[problem.unit_of[:, None] == problem.unit_of[None, :]] = 0.0
    return replace(problem, choices=names, pairwise=(pairs + pairs.T) / 2 if pairwise else None)


def _losses(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    scale = {"tiny losses": 1e-9, "large losses": 1e7}.get(kind, 1.0)
    return rng.integers(0, 3, size).astype(float) if kind == "ties" else rng.normal(size=size) * scale


def _costs(rng: np.random.Generator, kind: str, size: int) -> np.ndarray:
    if kind in ("ties", "whole costs"):
        return rng.integers(0, 5, size).astype(float)
    costs = rng.random(size) * (1e12 if kind == "huge costs" else 1.0)
    return np.where(rng.random(size) < 0.4, 0.0, costs) if kind == "free choices" else costs


# Adapters -------------------------------------------------------------------------------------------------------------------


def check_adapter(
    adapter: AbstractAdapter,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    calibration: Iterable[Any] = (),
    bits: BitConfig | None = None,
    formats: Sequence[str] | None = None,
) -> None:
    """Take a small network through all that an adapter does: `prepare`, training, `save`, `load`, `export`, reading, running.

    The bits and codes of every file are those of the module, and it computes the same. What the adapter calls unconvertible
    or refuses is refused by `prepare` too; other models' bits, unknown layers and files that are none raise errors of ours;
    the float model stays as it was. Every trainable parameter gets a gradient, and those that the float model lacks are
    `range_parameters`, or biases.

    Args:
        adapter: what is checked.
        folder: where files may be written.
        model: a small float network; one of ours if left out.
        calibration: batches as it takes them; to be given with a model.
        bits: what to prepare it at; if left out, precisions of the adapter's default menu in turn.
        formats: the formats to export; all of the adapter's if left out.

    Raises:
        AssertionError: with the promise that is broken.

    Example:
        >>> check_adapter(MyAdapter(), "folder")  # doctest: +SKIP
    """
    told, folder = f"the adapter {adapter.name}", Path(folder)
    model = (example_network() if model is None else model).eval()
    data = list(map(Batch.of, calibration)) or example_batches()
    example = data[0].inputs
    inventory = find_layers(model, example)
    with _unchanged(model, told):
        bits = bits or _bits(adapter, model, example)
        _check_refusals(adapter, model, inventory, bits, data, told)
        numbers = torch.get_rng_state()
        module = adapter.prepare(model, bits, example, data)
        _require(torch.equal(torch.get_rng_state(), numbers), f"{told} draws from the random numbers of others in prepare")
    _require(bits_of(module) == bits and adapter_of(module) == adapter, f"bits_of a module of {told} are not those asked for")
    _check_codes(adapter, module, inventory, bits, told)
    with _unchanged(module, told):
        expected = _outputs(module, example)
        _require(_equal(expected, _outputs(module, example)), f"a module of {told} computes otherwise the second time")
        _check_copies(adapter, model, module, example, folder, told)
        for format in adapter.formats if formats is None else formats:
            _check_format(adapter, module, format, example, folder, told)
    _must_raise(AdapterError, lambda: adapter.export(module, folder / "none", example, format="none"), f"{told}: no format")
    nothing = folder / f"nothing{adapter.suffix()}"
    nothing.write_bytes(b"nothing")
    _must_raise(FormatError, lambda: adapter.read_bits(nothing), f"{told} reading a file that is none")
    _check_training(adapter, model, copy.deepcopy(module), example, told)
    _check_switching(adapter, copy.deepcopy(module), inventory, told)


def _bits(adapter: AbstractAdapter, model: nn.Module, example: Any) -> BitConfig:
    """Choices in turn, activation bits agreeing where the adapter shares a quantizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = build_space(model, example, adapter=adapter)
    activation = {unit.activation_group: unit.choices[0].activation for unit in space.units}
    layers: dict[str, Precision] = {}
    for index, unit in enumerate(space.units):
        choices = [choice for choice in unit.choices if choice.activation == activation[unit.activation_group]]
        layers.update(dict.fromkeys(unit.layers, choices[(2 * index + 1) % len(choices)]))
    return BitConfig(layers, space.fingerprint)


def _check_refusals(
    adapter: AbstractAdapter, model: nn.Module, inventory: Inventory, bits: BitConfig, data: Sequence[Batch], told: str
) -> None:
    example = data[0].inputs

    def prepare(layers: dict[str, Precision], fingerprint: str = bits.fingerprint, batches: Sequence[Batch] = data) -> Any:
        return adapter.prepare(model, BitConfig(layers, fingerprint), example, batches)

    layers = dict(bits.layers)
    one = next(iter(layers.values()))
    _must_raise(UnknownLayerError, lambda: prepare({**layers, "no such layer": one}), f"{told} at an unknown layer")
    _must_raise(FingerprintError, lambda: prepare(layers, "sha256:0"), f"{told} at the bits of another model")
    _must_raise(DataError, lambda: prepare(layers, batches=()), f"{told} without calibration data")
    reasons = adapter.unconvertible(model, inventory, example)
    for name in reasons:
        _require(name in {layer.name for layer in inventory}, f"{told} calls {name} unconvertible, which is no layer")
        _must_raise(AdapterError, lambda name=name: prepare({**layers, name: one}), f"{told} at {name}: {reasons[name]}")
    refused = {name: [own for own in _EVERY if adapter.refuse(inventory[name], own) is not None] for name in layers}
    for name, precisions in refused.items():
        _require(layers[name] not in precisions, f"{told} refuses {layers[name]} of {name}, which it is to prepare")
    name = max(refused, key=lambda name: len(refused[name]))
    if refused[name]:
        _must_raise(MPQError, lambda: prepare({**layers, name: refused[name][0]}), f"{told} at {refused[name][0]} of {name}")


def _check_codes(adapter: AbstractAdapter, module: nn.Module, inventory: Inventory, bits: BitConfig, told: str) -> None:
    codes = adapter.codes(module)
    _require(codes.keys() == bits.layers.keys(), f"{told} has codes of {sorted(codes)}, but bits of {sorted(bits.layers)}")
    for name, own in codes.items():
        width, shape = bits[name].weight, inventory[name].weight_shape
        _require(own.shape == tuple(shape), f"codes of {name} have shape {own.shape}, the weight {shape}")
        whole = np.array_equal(own, np.round(own))
        span = int(own.max()) - int(own.min())
        least = 2 if width == 1 else 2**width - 1  # one bit may stand for -1 and 1
        fits = whole and span <= least and len(np.unique(own)) <= 2**width
        _require(fits, f"codes of {name} from {own.min()} to {own.max()} are no whole numbers of {width} bits")


def _check_copies(adapter: AbstractAdapter, model: nn.Module, module: nn.Module, example: Any, folder: Path, told: str) -> None:
    saved = adapter.save(module, folder / "module.pt")
    for how, other in (("deepcopy", copy.deepcopy(module)), ("load", adapter.load(model, saved, example))):
        _require(bits_of(other) == bits_of(module), f"{told}: {how} gives a module of other bits")
        _require(_equal(_outputs(other, example), _outputs(module, example)), f"{told}: {how} gives another computation")
        _require(_same_codes(adapter.codes(other), adapter.codes(module)), f"{told}: {how} gives other codes")
        _require(adapter.prepared_with(other) == adapter.prepared_with(module), f"{told}: {how} gives other options")
    other = nn.Sequential(copy.deepcopy(model), nn.Identity())
    _must_raise(MPQError, lambda: adapter.load(other, saved, example), f"{told} loading into another model")


def _check_format(adapter: AbstractAdapter, module: nn.Module, format: str, example: Any, folder: Path, told: str) -> None:
    where, bits = f"{told}, format {format}", bits_of(module)
    path = adapter.export(module, folder / f"{format}{adapter.suffix(format)}", example, format=format)
    _require(path.is_file(), f"{where}: export returned {path}, which is no file")
    _require(path.name.endswith(adapter.suffix(format)), f"{where}: {path.name} does not end in {adapter.suffix(format)}")
    _require(_same_codes(adapter.read_codes(path), adapter.codes(module)), f"{where}: the file holds other codes")
    try:
        verify(adapter, path, bits, module=module, inputs=example).check()
    except MPQError as error:
        _fail(f"{where}: {error}")
    for name, precision in bits.layers.items():
        stored = adapter.storage(precision, format)
        _require(stored >= precision.weight, f"{where}: storage({precision}) is {stored} bits, though {name} was exported")


def _check_training(adapter: AbstractAdapter, model: nn.Module, module: nn.Module, example: Any, told: str) -> None:
    module.train()
    outputs = [tensor for tensor in tensors(call(module, example)) if tensor.is_floating_point()]
    loss: Any = torch.stack([tensor.square().mean() for tensor in outputs]).sum()
    loss.backward()
    ranges = {id(parameter) for parameter in adapter.range_parameters(module)}
    own = {name for name, _ in model.named_parameters()}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        finite = parameter.grad is not None and bool(parameter.grad.isfinite().all())
        _require(finite, f"{told}: {name} is trainable, but gets no finite gradient")
        known = id(parameter) in ranges or name in own or name.endswith(".bias") or "parametrizations." in name
        _require(known, f"{told}: {name} is trainable and not the model's, but not among range_parameters")
        _require(not (id(parameter) in ranges and name in own), f"{told}: {name} is the model's, but among range_parameters")
    _require(ranges <= set(map(id, module.parameters())), f"{told}: range_parameters are not all parameters of the module")


def _check_switching(adapter: AbstractAdapter, module: nn.Module, inventory: Inventory, told: str) -> None:
    if type(adapter).set_bits is AbstractAdapter.set_bits:
        return
    bits, before = bits_of(module), list(module.parameters())
    widest = max(own.weight for own in bits.layers.values())
    layers = {name: Precision(widest, own.activation) for name, own in bits.layers.items()}
    layers = {name: bits[name] if adapter.refuse(inventory[name], own) else own for name, own in layers.items()}
    _must_raise(FingerprintError, lambda: adapter.set_bits(module, BitConfig(layers, "sha256:0")), f"{told}: other bits")
    _require(bits_of(module) == bits, f"{told}: set_bits changed a module that it refused")
    switched = BitConfig(layers, bits.fingerprint)
    adapter.set_bits(module, switched)
    _require(bits_of(module) == switched, f"{told}: after set_bits the module says other bits")
    _require(all(a is b for a, b in zip(before, module.parameters(), strict=True)), f"{told}: set_bits made new parameters")
    _check_codes(adapter, module, inventory, switched, told)


def _same_codes(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)


def _outputs(module: nn.Module, inputs: Any) -> list[torch.Tensor]:
    with evaluating(module):
        return [tensor.clone() for tensor in tensors(call(module, inputs))]


def _equal(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


# Shared ---------------------------------------------------------------------------------------------------------------------


def example_network(*, shared: bool = False) -> nn.Module:
    """A convolution, a depthwise and a point one with batch normalisation, and linear layers, two of one weight if `shared`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 12, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2)),
            *(nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 5)),
        )
        if shared:
            network[13].weight = network[11].weight
        with torch.no_grad():
            for batch in example_batches():
                network(batch.inputs)  # statistics that are not those of the start
    return network.eval()


def example_batches() -> list[Batch]:
    """Two batches of 8 images [3, 12, 12] with labels, for `example_network`."""
    generator = torch.Generator().manual_seed(1)
    return [Batch(torch.randn(8, 3, 12, 12, generator=generator), torch.arange(8) % 5) for _ in range(2)]


def _space(model: nn.Module, example: Any) -> Space:
    """Precisions of 2, 4 and 8 bits, the last layer pinned and the first two tied."""
    inventory = find_layers(model, example)
    names = [layer.name for layer in inventory]
    return Space.build(inventory, menu((2, 4, 8), (4, 8)), pin={names[-1]: "w8a8"}, tie=[names[:2]] if len(names) > 2 else [])


@contextlib.contextmanager
def _unchanged(module: nn.Module, told: str) -> Iterator[None]:
    """Fail if the tensors, modes, hooks or gradients of a module change meanwhile."""
    before = _state(module)
    yield
    for what, value in _state(module).items():
        _require(value == before[what], f"{told} changes {what} of the model")


def _state(module: nn.Module) -> dict[str, Any]:
    parts = dict(module.named_modules())
    return {
        "tensors": {name: _bytes(tensor) for name, tensor in module.state_dict().items()},
        "the classes": {name: type(part) for name, part in parts.items()},
        "the training mode": {name: part.training for name, part in parts.items()},
        "hooks": {name: (len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in parts.items()},
        "requires_grad or gradients": {name: (own.requires_grad, own.grad is None) for name, own in module.named_parameters()},
    }


def _random_numbers() -> tuple[Any, ...]:
    return _bytes(torch.get_rng_state()), random.getstate(), str(np.random.get_state())


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()


def _must_raise(kind: type[Exception], action: Any, told: str) -> None:
    try:
        action()
    except kind:
        return
    except Exception as error:
        _fail(f"{told} raises {type(error).__name__}, not {kind.__name__}: {error}")
    _fail(f"{told} raises nothing, where {kind.__name__} is promised")


def _require(holds: bool, fact: str) -> None:
    if not holds:
        _fail(fact)


def _fail(fact: str) -> NoReturn:
    raise AssertionError(fact)
