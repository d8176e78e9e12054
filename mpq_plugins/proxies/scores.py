"""What each choice loses: the product of a proxy, saved so that solving again needs neither model nor data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpq_plugins.common.files import check_keys, read_json, write_json
from mpq_plugins.common.html import html_table
from mpq_plugins.common.text import listed
from mpq_plugins.errors import FormatError, MPQError
from mpq_plugins.space.space import Space

FORMAT = "mpq-scores/1"


@dataclass(frozen=True, eq=False)
class Scores:
    """`loss[unit][choice]`, to be minimised, in the units and choices of `space`.

    `proxy` is the recipe (name and options); `facts` holds what the proxy measured on the way (named lists of numbers, such
    as theta per unit), for reports. `pairwise` [all choices, all choices] is the optional cross-layer term, x'Px / 2.
    Raises `FormatError` when shapes disagree or a loss is not finite. Two scores are equal when they are one object.

    Example:
        >>> space = mpq.build_space(torch.nn.Sequential(torch.nn.Linear(16, 8)), torch.zeros(1, 16), choices=(2, 8))
        >>> mpq.Scores(space, ((0.5, 0.1),), {"name": "mine"}).loss
        ((0.5, 0.1),)
    """

    space: Space
    loss: tuple[tuple[float, ...], ...]  # [unit][choice]
    proxy: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)
    pairwise: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.loss) != len(self.space.units):
            raise FormatError(f"scores for {len(self.loss)} units, but the space has {len(self.space.units)}.")
        for unit, losses in zip(self.space.units, self.loss, strict=True):
            if len(losses) != len(unit.choices):
                raise FormatError(f"{unit.name} has {len(unit.choices)} choices and {len(losses)} losses.")
            if not np.all(np.isfinite(losses)):
                raise FormatError(f"the loss of {unit.name} is not finite: {list(losses)}. Score again on finite data.")
        if self.pairwise is not None:
            n_choices = sum(map(len, self.loss))
            if self.pairwise.shape != (n_choices, n_choices):
                found, expected = self.pairwise.shape, (n_choices, n_choices)
                raise FormatError(f"pairwise has shape {found}, expected {expected}: a row for each choice.")
            if not np.all(np.isfinite(self.pairwise)):
                raise FormatError("pairwise holds values that are not finite. Score again on finite data.")

    def __repr__(self) -> str:
        options = [f"{name}={value!r}" for name, value in self.proxy.items() if name != "name"]
        losses = [loss for row in self.loss for loss in row]
        pairs = "" if self.pairwise is None else " and of their pairs"
        return (
            f"Scores by {self.proxy.get('name', 'no proxy')}({listed(options, 12)[:300]})\n"
            f"  losses of {len(losses)} choices{pairs} of {len(self.loss)} units: {min(losses):.3g} to {max(losses):.3g}"
        )

    def _repr_html_(self) -> str:
        header = sorted({choice for unit in self.space.units for choice in unit.choices})
        table = [
            (unit.name, dict(zip(unit.choices, row, strict=True)))
            for unit, row in zip(self.space.units, self.alone(), strict=True)
        ]
        rows = [(name, *(f"{losses[choice]:.3g}" if choice in losses else "" for choice in header)) for name, losses in table]
        return html_table(repr(self), ("unit", *map(str, header)), rows)

    def alone(self) -> tuple[tuple[float, ...], ...]:  # [unit][choice]
        """The loss of every choice with no other unit's interaction: `loss` and half the diagonal of `pairwise`."""
        if self.pairwise is None:
            return self.loss
        half = iter((0.5 * np.diag(self.pairwise)).tolist())
        return tuple(tuple(loss + next(half) for loss in row) for row in self.loss)

    def save(self, path: str | Path) -> Path:
        """Write the scores as JSON."""
        pairwise = None if self.pairwise is None else self.pairwise.tolist()
        document = {"format": FORMAT, "space": self.space.to_json(), "loss": [list(row) for row in self.loss]}
        return write_json(path, {**document, "proxy": dict(self.proxy), "facts": dict(self.facts), "pairwise": pairwise})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read scores written by `save`; raises `FormatError`."""
        document = read_json(path, format=FORMAT)
        keys = {"format", "space", "loss", "proxy", "facts", "pairwise"}
        check_keys(document, allowed=keys, required=keys, where=str(path))
        pairwise, losses = document["pairwise"], document["loss"]
        try:
            if not all(isinstance(loss, (int, float)) and not isinstance(loss, bool) for row in losses for loss in row):
                raise TypeError("its losses must be lists of numbers")
            return cls(
                Space.from_json(document["space"]),
                tuple(tuple(map(float, row)) for row in losses),
                dict(document["proxy"]),
                dict(document["facts"]),
                None if pairwise is None else np.asarray(pairwise, dtype=float),
            )
        except MPQError as error:
            raise FormatError(f"{path}: {error}") from error
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise FormatError(f"{path} holds scores that cannot be read: {error!r}. Score again.") from error
