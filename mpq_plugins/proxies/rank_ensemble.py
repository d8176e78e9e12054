"""Rank ensemble: the mean rank of every choice over several scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from mpq_plugins.errors import PluginError
from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.proxies.scores import Scores
from mpq_plugins.proxies.sensitivity import AbstractSensitivity, by_unit
from mpq_plugins.space.space import Space

if TYPE_CHECKING:
    from torch import nn


@final
@dataclass(frozen=True)
class RankEnsemble(AbstractSensitivity):
    """The mean rank that several proxies give a choice among all choices of all free units; equal losses share a rank.

    `members` names them, joined by commas or as a tuple. The other options are handed to the members that have them, all
    else is at its default. Ranks run from 1, the least loss, so that scores of any scale count alike. What is lost is the
    size of a loss: a plan's summed ranks put two small harms on a par with one large one.
    Raises `PluginError` for members that score pairs of choices or another space, which have no ranks here.
    """

    name: ClassVar[str] = "rank-ensemble"
    members: str | tuple[str, ...] = "fisher,kl-divergence,weight-error"
    correction: bool = True
    interpolate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.members, str):
            object.__setattr__(self, "members", ",".join(self.members))
        if not self._names():
            raise PluginError("a rank ensemble needs members. Name proxies joined by commas: members=fisher,weight-error.")
        if self.name in self._names():
            raise PluginError(f"{self.name} cannot be a member of itself. Name other proxies: {self.members}.")

    @property
    def needs_labels(self) -> bool:
        """Where a member needs them."""
        return any(member.needs_labels for member in self._members())

    def score(self, model: nn.Module, space: Space, batches: Iterable[Any] = ()) -> Scores:
        """Mean ranks; `facts` holds the losses by each member."""
        from mpq_plugins.proxies.measuring import sensitivity_set

        members = self._members()
        with_data = any(member.needs_data for member in members)
        images = sensitivity_set(batches, self.n_images) if with_data else []
        rows = {member.name: _row(space, member.score(model, space, images)) for member in members}
        free = np.concatenate([np.full(len(unit.choices), space.is_free(unit)) for unit in space.units])
        total = np.zeros(len(free))
        for row in rows.values():
            total[free] += ranks(row[free])
        facts = {"members": {name: row.tolist() for name, row in rows.items()}}
        return Scores(space, by_unit(space, total / len(rows)), self.recipe(), facts)

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name.strip() for name in str(self.members).split(",") if name.strip()))

    def _members(self) -> list[AbstractProxy]:
        from mpq_plugins.common.plugins import make

        known = {name: {field.name for field in fields(make("proxies", name))} for name in self._names()}
        return [make("proxies", name, {own: getattr(self, own) for own in vars(self) if own in known[name]}) for name in known]


def _row(space: Space, scores: Scores) -> np.ndarray:  # [choice]
    name = scores.proxy["name"]
    if scores.pairwise is not None:
        raise PluginError(f"{name} scores pairs of choices, which have no ranks. Leave it out, or take loss-increase.")
    if scores.space != space:
        raise PluginError(f"{name} scores another space than the one given. Leave it out of the ensemble.")
    return np.concatenate([np.asarray(losses) for losses in scores.loss])


def ranks(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Ranks from 1 for the least; equal values share the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: np.ndarray = (last - (counts - 1) / 2)[place.reshape(-1)]
    return shared
