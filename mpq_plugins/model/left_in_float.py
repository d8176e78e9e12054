"""How much of a model stays in float, and why: said aloud, or an error where the user is strict."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any

from mpq_plugins.common.text import listed
from mpq_plugins.errors import FloatLayersWarning, SpaceError
from mpq_plugins.model.layers import EXCLUDED, Layer, Skipped, distinct_weights

_WORTH_TELLING = 0.01  # share of the weights or of the multiply-accumulates
_MOST_REASONS = 4


@dataclass(frozen=True)
class FloatReason:
    """Shares of a model's weights and multiply-accumulates that stay in float for one `reason`, and what they are of."""

    reason: str
    names: tuple[str, ...]
    weights: float
    macs: float


@dataclass(frozen=True)
class LeftInFloat:
    """The shares of a model that get no bits, the largest reason first; as text, with the next step.

    Shares are of all weights of two or more dimensions and of the multiply-accumulates that are known, from 0 to 1.
    """

    weights: float
    macs: float
    reasons: tuple[FloatReason, ...]

    @classmethod
    def of(cls, layers: Iterable[Layer], skipped: Iterable[Skipped]) -> LeftInFloat:
        """The shares of `skipped` beside the `layers` that are searched."""
        layers, skipped = tuple(layers), tuple(skipped)
        n_weights = distinct_weights(layers) + sum(item.n_weights for item in skipped)
        macs = sum(layer.macs for layer in layers) + sum(item.macs for item in skipped)
        members: dict[str, list[Skipped]] = {}
        for item in skipped:
            members.setdefault(item.reason, []).append(item)
        reasons = [
            FloatReason(
                reason,
                tuple(item.name for item in items),
                sum(item.n_weights for item in items) / max(n_weights, 1),
                sum(item.macs for item in items) / max(macs, 1),
            )
            for reason, items in members.items()
        ]
        reasons.sort(key=lambda reason: (-reason.weights, -reason.macs))
        return cls(sum(reason.weights for reason in reasons), sum(reason.macs for reason in reasons), tuple(reasons))

    @property
    def is_much(self) -> bool:
        """Whether more than one per cent of the weights or of the multiply-accumulates stays in float."""
        return max(self.weights, self.macs) > _WORTH_TELLING

    def check(self) -> None:
        """Raise `SpaceError` where much stays in float that the user did not exclude."""
        rest = tuple(reason for reason in self.reasons if reason.reason != EXCLUDED)
        unasked = LeftInFloat(sum(reason.weights for reason in rest), sum(reason.macs for reason in rest), rest)
        if unasked.is_much:
            raise SpaceError(f"{unasked}\nExclude what shall stay in float, change the model, or leave strict off.")

    def tell(self, *, strict: bool) -> None:
        """Warn with `FloatLayersWarning` where much stays in float; when `strict`, raise what `check` raises instead.

        The warning is at the line of the user that led here.
        """
        if strict:
            self.check()
        if self.is_much:
            frames = inspect.stack(context=0)
            level = next((i for i, one in enumerate(frames) if not _is_ours(one.frame)), len(frames))
            warnings.warn(f"{self}\nstrict=True makes this an error.", FloatLayersWarning, stacklevel=level + 1)

    def to_json(self) -> dict[str, Any]:
        """The shares and the reasons as plain JSON values."""
        reasons = [{**vars(reason), "names": list(reason.names)} for reason in self.reasons]
        return {"weights": self.weights, "macs": self.macs, "reasons": reasons}

    def __str__(self) -> str:
        lines = [f"{shares(self.weights, self.macs)} stay in float and outside every budget:"]
        told = [reason for reason in self.reasons if max(reason.weights, reason.macs) > 0]
        for reason in told[:_MOST_REASONS]:
            lines.append(f"  {shares(reason.weights, reason.macs)}: {listed(reason.names, 1)}: {reason.reason}")
        if len(told) > _MOST_REASONS:
            lines.append(f"  and {len(told) - _MOST_REASONS} smaller reasons; `mpq layers` lists all")
        return "\n".join(lines)


def shares(weights: float, macs: float) -> str:
    """`30 % of the weights and 4.2 % of the MACs`."""
    return f"{_percent(weights)} of the weights and {_percent(macs)} of the MACs"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share >= 1e-3 or share == 0 else "less than 0.1 %"


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("mpq_plugins.")
