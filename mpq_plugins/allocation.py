"""The whole path from a float model and budgets to a bit configuration, in one call."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from mpq_plugins.adapter.base import AbstractAdapter
from mpq_plugins.common.allocator import keeping_memory
from mpq_plugins.common.html import html_table
from mpq_plugins.common.plugins import resolve
from mpq_plugins.costs import BitOps, WeightSize
from mpq_plugins.costs.base import AbstractCost, Budget, format_amount, options_of
from mpq_plugins.costs.budgets import Budgets, as_budgets
from mpq_plugins.errors import BudgetError, PluginError, SpaceError
from mpq_plugins.model.discover import find_layers
from mpq_plugins.model.layers import Inventory, skipped_layers
from mpq_plugins.model.left_in_float import LeftInFloat
from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.solvers.base import AbstractSolver
from mpq_plugins.solvers.problem import build_problem, check_reachable
from mpq_plugins.solvers.selection import Measure, Selection, in_space, select_plan
from mpq_plugins.solvers.solution import Solution
from mpq_plugins.solvers.solve import solve
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.precision import Precision, menu
from mpq_plugins.space.space import AverageBits, Menus, Pins, Space, Ties, first_and_last, pins_of

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins.model.run import Output

AUTO_IMAGES = 32  # the least number for which corrections are sound


@dataclass(frozen=True)
class Allocation:
    """A bit configuration with everything it was decided from: save the parts that are worth keeping."""

    bits: BitConfig
    scores: Scores
    solution: Solution
    selection: Selection | None = None

    @property
    def space(self) -> Space:
        """The decision space, with what was skipped and pinned."""
        return self.scores.space

    def __repr__(self) -> str:
        return "\n  ".join(
            [
                f"Allocation by {self.scores.proxy.get('name', '')}, {self.solution.solver}: {self.solution.status.name}, "
                f"gap {self.solution.gap:.1e}",
                self.bits.summary(),
                f"weight bits on average: {self.average_bits}",
                self._costs(),
            ]
        )

    def _repr_html_(self) -> str:
        rows = [
            (layer.name, f"{layer.n_weights:,}", self.bits[layer.name].weight, self.bits[layer.name].activation)
            for layer in self.space.layers
        ]
        first, *_, average, costs = repr(self).split("\n")
        return html_table(first, ("layer", "weights", "weight bits", "activation bits"), rows, (average, costs))

    def _costs(self) -> str:
        """Every cost, beside its limit where it has one."""
        limits = {row["name"]: row for row in self.bits.origin["budgets"]}
        units = {"size": "B", "bops": "BOPs", **{name: row["unit"] for name, row in limits.items()}}
        return ", ".join(
            f"{name} {format_amount(amount, units[name])}"
            + (f" of {format_amount(limits[name]['limit'], units[name])}" if name in limits else "")
            for name, amount in self.bits.costs.items()
        )

    @property
    def average_bits(self) -> AverageBits:
        """Weight bits per weight, over all searched layers and over those that are not pinned."""
        return self.space.average_bits(self.bits.layers)


def allocate(
    model: nn.Module,
    example: Any,
    batches: Iterable[Any] = (),
    *,
    budgets: Budgets,
    proxy: AbstractProxy | str = "auto",
    choices: Menus | None = None,
    adapter: AbstractAdapter | type[AbstractAdapter] | str | None = None,
    solver: AbstractSolver | str | None = None,
    pin: Pins | None = None,
    pin_first_last: bool = False,
    tie: Ties = (),
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    strict: bool = False,
    output: Output = None,
    top_k: int = 1,
    cache: str | Path | None = None,
) -> Allocation:
    """Choose the bit-width of every layer under `budgets` by the losses of `proxy`.

    Args:
        model: a float torch model; it stays as it is.
        example: one input as the model takes it, the first axis the batch.
        batches: what the proxy looks at (see `Batch.of`).
        budgets: `"size=w4"`, `{"size": "w4", "bops": "75G"}`, or `Budget` objects.
        proxy: a name, class or object; "auto" is `kl-divergence` for class logits, else `output-error`, on 32 images.
        solver: a name, class or object; `Auto` by default.
        output: the output that counts: a key, an index or a function; needed where the model returns several tensors.
        top_k: measure the true loss of so many best plans, and keep the best of those.
        cache: a folder for measurements: an interrupted run resumes there, and another budget needs no new ones.
        choices, adapter, pin, pin_first_last, tie, include, exclude, strict: see `build_space`.

    Raises `InfeasibleBudgetError` before anything is scored, and what `build_space`, the proxy and `solve` raise.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
        >>> allocation = mpq.allocate(model, torch.zeros(1, 16), budgets="size=w4", proxy="weight-error", choices=(2, 4, 8))
        >>> allocation.bits.summary(), allocation.bits.costs["size"]  # bytes
        ('w4a8: 0, 1', 80.0)
    """
    from mpq_plugins.proxies.measuring import keeping_measurements

    search = Search.of(
        model,
        example,
        batches,
        budgets=budgets,
        proxy=proxy,
        solver=solver,
        output=output,
        top_k=top_k,
        choices=choices,
        adapter=adapter,
        pin=pin,
        pin_first_last=pin_first_last,
        tie=tie,
        include=include,
        exclude=exclude,
        strict=strict,
    )
    with keeping_measurements(cache):
        return search.allocation(search.scores())


@final
@dataclass(frozen=True, eq=False)
class Search:
    """A search as it was asked for, checked before anything is measured; the path of all that allocates."""

    model: nn.Module
    space: Space
    budgets: tuple[Budget, ...]
    proxy: AbstractProxy
    batches: Iterable[Any] = ()
    solver: AbstractSolver | None = None
    output: Output = None
    top_k: int = 1

    @classmethod
    def of(
        cls,
        model: nn.Module,
        example: Any,
        batches: Iterable[Any] = (),
        *,
        budgets: Budgets,
        proxy: AbstractProxy | str = "auto",
        options: Mapping[str, Any] | None = None,
        solver: AbstractSolver | str | None = None,
        output: Output = None,
        top_k: int = 1,
        **space: Any,
    ) -> Search:
        """The search of `allocate`; `options` are those of a proxy that is named, `space` the arguments of `build_space`."""
        from mpq_plugins.model.check import plain_model

        check_top_k(top_k)
        model = plain_model(model)
        decisions = build_space(model, example, **space)
        resolved = as_budgets(budgets)
        check_reachable(decisions, resolved)
        chosen = proxy_of(proxy, model, example, output, options)
        method = None if solver is None else resolve("solvers", solver)
        return cls(model, decisions, resolved, chosen, list(batches) if top_k > 1 else batches, method, output, top_k)

    def scores(self) -> Scores:
        """What each choice loses by the proxy; raises `PluginError` where that returns something else."""
        proxy = self.proxy if self.output is None else self.proxy.looking_at(self.output)
        with keeping_memory():
            scores: Any = proxy.score(self.model, self.space, self.batches)
        if not isinstance(scores, Scores):
            raise PluginError(
                f"the proxy {getattr(proxy, 'name', type(proxy).__name__)!r} returned a {type(scores).__name__}, not Scores. "
                "Return Scores(space, losses, self.recipe()), with one row of losses for each unit of the space."
            )
        return scores

    def allocation(self, scores: Scores) -> Allocation:
        """The best plan of these scores, or of the best `top_k` the one of least true loss."""
        measure = None
        if self.top_k > 1:
            from mpq_plugins.proxies.measuring import SensitivityRun

            setup = self.proxy.setup()
            setup = setup if setup.output is not None else replace(setup, output=self.output)
            measure = SensitivityRun(self.model, scores.space, self.batches, setup).losses_at
        return solve_scores(scores, self.budgets, solver=self.solver, top_k=self.top_k, measure=measure)


def build_space(
    model: nn.Module,
    example: Any,
    *,
    choices: Menus | None = None,
    adapter: AbstractAdapter | type[AbstractAdapter] | str | None = None,
    pin: Pins | None = None,
    pin_first_last: bool = False,
    tie: Ties = (),
    include: str | Sequence[str] = ("*",),
    exclude: str | Sequence[str] = (),
    strict: bool = False,
) -> Space:
    """List what a target leaves open: the layers to decide on and the precisions of each.

    Args:
        model: a float torch model; it stays as it is.
        example: one input as the model takes it, the first axis the batch.
        choices: one menu, such as `(2, 4, 8)` or `("w4a4", "w8a8")`, or glob -> menu; by default what `adapter` runs.
        adapter: the target; what its framework keeps in float, refuses or ties is so here too.
        pin: layer or glob -> precision, such as `{"conv1": "w8a8"}`.
        pin_first_last: pin both at w8a8, as papers do; at equal size a measured score does better without (benchmarks/real).
        tie: groups of layers or globs that take one precision, such as `[("conv1", "conv2")]`.
        include, exclude: globs of layers to search, and of layers to keep in float.
        strict: raise where it would warn.

    Warns with `FloatLayersWarning` when over 1 % of weights or multiply-accumulates stay in float that were not excluded.
    Raises `SpaceError` (for those too if `strict`), `ModelError`, `PrecisionError` and `UnknownLayerError`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 4))
        >>> [len(unit.choices) for unit in mpq.build_space(model, torch.zeros(1, 16), choices=(2, 4, 8), pin={"1": 8}).units]
        [3, 1]
    """
    target: AbstractAdapter | None = None if adapter is None else resolve("adapters", adapter)
    inventory = find_layers(model, example, include=include, exclude=exclude)
    share: tuple[tuple[str, ...], ...] = ()
    if target is not None:
        inventory = without(inventory, target.unconvertible(model, inventory, example))
        known = {layer.name for layer in inventory}
        groups = target.activation_groups(model, example)
        share = tuple(group for group in (tuple(n for n in names if n in known) for names in groups) if len(group) > 1)
        choices = choices or menu(target.weight_bits, target.activation_bits)
    pins = {**(first_and_last(inventory) if pin_first_last else {}), **pins_of(pin)}
    space = Space.build(
        inventory,
        choices,
        pin=pins,
        tie=tie,
        share_activations=share,
        refuse=target.refuse if target is not None else lambda layer, precision: None,
    )
    LeftInFloat.of(space.layers, space.skipped).tell(strict=strict)
    return space


def proxy_of(
    given: AbstractProxy | str, model: nn.Module, example: Any, output: Output = None, options: Mapping[str, Any] | None = None
) -> AbstractProxy:
    """The proxy that was given or named.

    "auto" is `kl-divergence` for class logits [N, class], else `output-error`, on 32 images.

    Probabilities and rows of length one (embeddings) are no logits.

    It is what chose best on pretrained networks (benchmarks/real): measured with the corrections that `prepare` makes.
    """
    from mpq_plugins.model.run import are_class_logits, call, evaluating, select, telling_failures

    options = options or {}
    if given == "auto":
        with evaluating(model), telling_failures(model):
            outputs = select(call(model, example), output)
        given = "kl-divergence" if are_class_logits(outputs) else "output-error"
        options = {"n_images": AUTO_IMAGES, **options}
    proxy: AbstractProxy = resolve("proxies", given, options)
    return proxy


def solve_scores(
    scores: Scores,
    budgets: Budgets,
    *,
    solver: AbstractSolver | str | None = None,
    top_k: int = 1,
    measure: Measure | None = None,
) -> Allocation:
    """Choose the best allocation by scores that exist already, without model and data.

    Args:
        scores: the losses of every choice.
        budgets: `"size=w4"`, `{"size": "w4", "bops": "75G"}`, or `Budget` objects.
        solver: a name, class or object; `Auto` by default.
        top_k: how many of the best plans to `measure`.
        measure: plans -> their true losses, over the space of the scores; the least wins.

    Raises `InfeasibleBudgetError`, `BudgetError` and `SolverError`.

    Example:
        >>> space = mpq.build_space(torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.zeros(1, 16), choices=(2, 4, 8))
        >>> solve_scores(mpq.Scores(space, ((0.9, 0.2, 0.0),), {"name": "mine"}), "size=w5").bits["0"]
        Precision(weight=4, activation=8)
    """
    check_top_k(top_k)
    resolved = as_budgets(budgets)
    problem = build_problem(scores, resolved)
    solution = solve(problem, solver, n_next=max(3, top_k - 1))
    selection = None
    if measure is not None and top_k > 1:
        shortlist = replace(solution, next_best=solution.next_best[: top_k - 1])
        solution, selection = select_plan(problem, scores.space, shortlist, measure)
    costs: dict[str, AbstractCost] = {cost.name: cost for cost in (WeightSize(), BitOps(), *(own.cost for own in resolved))}
    layers = scores.space.assignment(in_space(problem, scores.space, solution.choice))
    bits = BitConfig(
        layers=layers,
        fingerprint=scores.space.fingerprint,
        origin=_origin(scores, resolved, solution, layers) | ({} if selection is None else {"selection": selection.to_json()}),
        costs={name: cost.at(scores.space, layers) for name, cost in sorted(costs.items())},
    )
    return Allocation(bits, scores, solution, selection)


def check_top_k(top_k: int) -> None:
    """Raise `BudgetError` for fewer plans than one."""
    if top_k < 1:
        raise BudgetError(f"top_k is {top_k}, but at least one plan has to be kept. Give 1 to switch the selection off.")


def without(inventory: Inventory, reasons: Mapping[str, str]) -> Inventory:
    """The inventory with the layers in `reasons` (layer name -> reason) skipped; raises `SpaceError` if none is left."""
    layers = tuple(layer for layer in inventory if layer.name not in reasons)
    if not layers:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:3])
        raise SpaceError(f"the framework would leave every layer in float ({told}). Use another adapter or model form.")
    return Inventory(layers, (*inventory.skipped, *skipped_layers(inventory, reasons)), inventory.fingerprint)


def _origin(scores: Scores, budgets: Sequence[Budget], solution: Solution, layers: Mapping[str, Precision]) -> dict[str, Any]:
    space = scores.space

    def in_bits(budget: Budget) -> dict[str, Any]:
        """What a limit on the size of the weights means in bits per weight; nothing for other budgets."""
        is_size = isinstance(budget.cost, WeightSize)
        return {"average_bits": space.average_bits_of_size(budget.resolve(space)).to_json()} if is_size else {}

    return {
        "proxy": dict(scores.proxy),
        "solver": solution.solver,
        "budgets": [
            {
                "options": options_of(budget.cost),
                "name": budget.cost.name,
                "asked": budget.limit,
                "limit": budget.resolve(space),
                "unit": budget.cost.unit,
                **in_bits(budget),
            }
            for budget in budgets
        ],
        "status": solution.status.name,
        "objective": solution.objective,
        "bound": solution.bound,
        "gap": solution.gap,
        "shadow_prices": list(solution.shadow_prices),
        "unused": list(solution.unused),
        "average_bits": space.average_bits(layers).to_json(),
        "pins": dict(space.pins),
        "ties": [list(unit.layers) for unit in space.units if len(unit.layers) > 1],
        "skipped": {item.name: item.reason for item in space.skipped},
        "versions": {name: importlib.metadata.version(name) for name in ("mpq-plugins", "torch", "pulp")},
    }
