"""Parameters inside tuples, which NNCF's trace does not know."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

_MARK = "_mpq_takes_tuples"


def take_tuples(mode: Any) -> None:
    """Let NNCF's `mode` see parameters in a tuple as it sees those in a list; else its trace ends in an error.

    `torch.cat((self.q_bias, self.v_bias))` stands in timm's attention. The whole process is affected, with equal numbers.
    """
    process = mode.process_parameters
    if hasattr(process, _MARK):
        return

    @functools.wraps(process)
    def process_tuples(self: Any, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        found, named = process(self, [_as_list(value) for value in args], {key: _as_list(kwargs[key]) for key in kwargs})
        return (
            [_as_given(one, given) for one, given in zip(found, args, strict=True)],
            {key: _as_given(named[key], kwargs[key]) for key in named},
        )

    setattr(process_tuples, _MARK, True)
    mode.process_parameters = process_tuples


def _as_list(value: Any) -> Any:
    return list(value) if type(value) is tuple and any(isinstance(item, nn.Parameter) for item in value) else value


def _as_given(found: Any, given: Any) -> Any:
    return tuple(found) if type(given) is tuple and isinstance(found, list) else found
