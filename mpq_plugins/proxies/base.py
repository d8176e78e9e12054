"""The interface of a score."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from mpq_plugins.common.plugins import Kind, Plugin
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn

    from mpq_plugins.model.run import Output
    from mpq_plugins.proxies.measuring.effects import MeasurementOptions


class AbstractProxy(Plugin, abc.ABC):
    """Scores how much each unit suffers at each choice. Implementations are frozen dataclasses of their options.

    Example:
        >>> class FewBits(mpq.AbstractProxy):
        ...     name, needs_data = "few-bits", False
        ...     def score(self, model, space, batches=()):
        ...         losses = tuple(tuple(1 / choice.weight for choice in unit.choices) for unit in space.units)
        ...         return mpq.Scores(space, losses, self.recipe())
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
        >>> mpq.allocate(model, torch.zeros(1, 16), budgets="size=w3", proxy=FewBits()).bits["0"].weight
        3
    """

    plugin_kind: ClassVar[Kind] = "proxies"
    name: ClassVar[str]
    needs_data: ClassVar[bool] = True

    @property
    def needs_labels(self) -> bool:
        """Whether `score` reads labels; the options may decide that."""
        return False

    @abc.abstractmethod
    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Losses of every choice in `space`.

        `batches` are items that `Batch.of` reads. Raises `DataError` when data or labels are missing or activations are
        not finite. The model is left as it was found.
        """

    def looking_at(self, output: Output) -> AbstractProxy:
        """The proxy with `output` as what counts of the model's result (see `select`), where it looks at results at all."""
        return self

    def setup(self) -> MeasurementOptions:
        """How the true loss of plans is measured beside this score: the default options, unless it has some itself."""
        from mpq_plugins.proxies.measuring.effects import MeasurementOptions

        return MeasurementOptions()

    def recipe(self) -> dict[str, Any]:
        """Name and options: what `Scores.proxy` and a bit configuration's origin record."""
        options: dict[str, Any] = dataclasses.asdict(self) if dataclasses.is_dataclass(self) else {}
        return {"name": self.name, **options}
