"""Several proxies at the same budgets, through the same adapters, judged by accuracy; the controls always beside them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_plugins.adapter.base import AbstractAdapter
from mpq_plugins.adapter.evaluate import accuracy
from mpq_plugins.allocation import Allocation, Search, solve_scores
from mpq_plugins.common.files import write_json
from mpq_plugins.common.plugins import make, resolve, resolve_all
from mpq_plugins.common.progress import track
from mpq_plugins.common.text import words_of
from mpq_plugins.costs.budgets import Budgets, as_budgets
from mpq_plugins.errors import BudgetError
from mpq_plugins.model.run import Output
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.solvers.problem import check_reachable
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn

CONTROLS = ("uniform", "constant", "random", "projection")
FORMAT = "mpq-comparison/1"


@dataclass(frozen=True)
class Row:
    """One allocation, applied through one adapter. `seconds` is scoring, solving and applying."""

    budget: str
    proxy: str
    adapter: str
    accuracy: float
    gap: float
    seconds: float
    bits: BitConfig

    @property
    def family(self) -> str:
        """The proxy, without the seed."""
        return self.proxy.split("#")[0]

    def to_json(self) -> dict[str, Any]:
        """The row as plain JSON values, bits as `w4a8` by layer."""
        bits = {name: str(precision) for name, precision in self.bits.layers.items()}
        return {**vars(self), "seconds": round(self.seconds, 3), "costs": dict(self.bits.costs), "bits": bits}


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison, in order of budget, proxy and adapter."""

    float_accuracy: float
    rows: tuple[Row, ...]

    def grouped(self) -> Iterator[list[Row]]:
        """Rows that differ only in the seed, together."""
        keys = [(row.budget, row.family, row.adapter) for row in self.rows]
        ranks = [list(dict.fromkeys(column)) for column in zip(*keys, strict=True)]  # the values of each, in their order
        for key in itertools.product(*ranks):
            if rows := [row for row, own in zip(self.rows, keys, strict=True) if own == key]:
                yield rows

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return {"format": FORMAT, "float_accuracy": self.float_accuracy, "rows": [row.to_json() for row in self.rows]}

    def save(self, path: str | Path) -> Path:
        """Write the comparison as JSON."""
        return write_json(path, self.to_json())


def compare(
    model: nn.Module,
    space: Space,
    *,
    example: Any,
    calibration: Sequence[Any],
    test: Sequence[Any],
    budgets: Mapping[str, Budgets],
    adapters: Mapping[str, AbstractAdapter | str] | Iterable[AbstractAdapter | str] | AbstractAdapter | str,
    proxies: Iterable[str] | str = ("ompq", "csmpq"),
    n_seeds: int = 20,
    output: Output = None,
    on_applied: Callable[[str, str, Allocation, AbstractAdapter, nn.Module], None] | None = None,
) -> Comparison:
    """Score with every proxy and control, solve at every budget, apply through every adapter, measure the accuracy.

    Args:
        model: the float model.
        space: the decisions.
        example: one input as the model takes it.
        calibration: batches for proxies and adapters.
        test: labelled batches for the accuracy.
        budgets: label -> budgets that hold together.
        adapters: adapters, or label -> adapter.
        proxies: names of scores; controls come on their own.
        n_seeds: runs of the random control.
        output: the output that counts: a key, an index or a function.
        on_applied: called with budget, proxy, allocation, adapter and module, once for each module; equal bits share one.

    Raises `BudgetError` for budgets without labels, and what `solve_scores` and `prepare` raise.

    Example:
        >>> model, batches = torch.nn.Sequential(torch.nn.Linear(16, 4)), [(torch.randn(32, 16), torch.arange(32) % 4)]
        >>> data = {"example": torch.zeros(1, 16), "calibration": batches, "test": batches}
        >>> space = mpq.build_space(model, data["example"], choices=(2, 4))
        >>> found = compare(model, space, **data, budgets={"w4": "size=w4"}, adapters="brevitas", proxies="ompq", n_seeds=1)
        >>> found.rows[0].proxy, found.rows[0].bits["0"].weight
        ('ompq', 4)
    """
    if not isinstance(budgets, Mapping):
        raise BudgetError(
            "budgets to compare at must be a mapping, label -> budgets. Write {'small': 'size=w3', 'large': 'size=w6'}."
        )
    asked = {label: as_budgets(together) for label, together in budgets.items()}
    for together in asked.values():
        check_reachable(space, together)
    labels = adapters if isinstance(adapters, Mapping) else {one.name: one for one in resolve_all("adapters", adapters)}
    targets: dict[str, AbstractAdapter] = {label: resolve("adapters", one) for label, one in labels.items()}
    scored = _scores(model, space, calibration, words_of(proxies), n_seeds, output)
    jobs = [(b, name, a) for b in asked for name in scored for a in targets]
    cache: dict[tuple[str, BitConfig], tuple[float, float]] = {}
    rows = []
    for budget, name, adapter_name in track(jobs, "applying"):
        scores, scoring_seconds = scored[name]
        start = time.perf_counter()
        allocation = solve_scores(scores, asked[budget])
        key = (adapter_name, allocation.bits)
        seconds = scoring_seconds + time.perf_counter() - start
        if key not in cache:
            adapter = targets[adapter_name]
            start = time.perf_counter()
            module = adapter.prepare(model, allocation.bits, example, calibration)
            applied_seconds = time.perf_counter() - start
            cache[key] = accuracy(module, test, output=output), applied_seconds
            if on_applied is not None:
                on_applied(budget, name, allocation, adapter, module)
        measured, applied_seconds = cache[key]
        gap, seconds = allocation.solution.gap, seconds + applied_seconds
        rows.append(Row(budget, name, adapter_name, measured, gap, seconds, allocation.bits))
    return Comparison(accuracy(model, test, output=output), tuple(rows))


def _scores(
    model: nn.Module, space: Space, batches: Sequence[Any], proxies: Sequence[str], n_seeds: int, output: Output
) -> dict[str, tuple[Scores, float]]:
    recipes: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in proxies}
    for control in CONTROLS:
        if control == "random":
            recipes.update({f"random#{seed}": ("random", {"seed": seed}) for seed in range(n_seeds)})
        else:
            recipes.setdefault(control, (control, {}))
    scored = {}
    for label, (name, options) in track(recipes.items(), "scoring"):
        start = time.perf_counter()
        scores = Search(model, space, (), make("proxies", name, options), batches, output=output).scores()
        scored[label] = scores, time.perf_counter() - start
    return scored
