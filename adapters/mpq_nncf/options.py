"""The options of the adapter that are part of a module: which quantizers it has, and of which kind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from mpq_plugins.adapter.record import record, recorded_fact
from mpq_plugins.common.files import check_keys, of_kinds, parse_json

_NAMES = ("merge_branches", "asymmetric")


def attach_options(module: nn.Module, options: Mapping[str, bool]) -> nn.Module:
    """Let a quantized module remember the options that it was prepared with; deepcopy keeps them."""
    return record(module, options=dict(options))


def options_of(module: nn.Module) -> Mapping[str, bool]:
    """The options that a module was prepared with; none for checkpoints older than this record."""
    return recorded_fact(module, "options") or {}


def to_json(options: Mapping[str, bool]) -> str:
    """The options as JSON text."""
    return json.dumps(dict(options), sort_keys=True)


def from_json(text: Any, *, where: str) -> dict[str, bool]:
    """Inverse of `to_json`; raises `FormatError`."""
    options = parse_json(text if isinstance(text, str) else "", where=where)
    check_keys(options, allowed=set(_NAMES), required=set(), where=where)
    of_kinds(options, dict.fromkeys(options, bool), where=where)
    return dict(options)
