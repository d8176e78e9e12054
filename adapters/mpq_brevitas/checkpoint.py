"""Checkpoints of quantized modules: tensors and JSON, nothing that unpickles code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq_brevitas import internals as brevitas
from mpq_brevitas.convert import convert
from mpq_brevitas.options import BrevitasOptions, options_of
from mpq_brevitas.support import check_convertible
from mpq_plugins.adapter.base import attach_bits
from mpq_plugins.adapter.checkpoint import check_same_model, read_checkpoint, write_checkpoint
from mpq_plugins.adapter.record import record
from mpq_plugins.errors import FormatError
from mpq_plugins.model.discover import find_layers

_ADAPTER = "brevitas"


def save(module: nn.Module, path: str | Path) -> Path:
    """Write tensors, bits and options; a module that is being trained can be saved at any time."""
    contents = {
        "recipe": json.dumps(options_of(module).to_json(), sort_keys=True),
        "state_dict": {name: tensor.detach() for name, tensor in module.state_dict().items()},
    }
    return write_checkpoint(path, module, contents, adapter=_ADAPTER)


def load(model: nn.Module, path: str | Path, example: Any) -> nn.Module:
    """Convert the float `model` again, without calibration, and fill in the saved tensors."""
    bits, document = read_checkpoint(path, {"recipe", "state_dict"}, adapter=_ADAPTER)
    options = BrevitasOptions.of(json.loads(document["recipe"]))
    inventory = find_layers(model, example)
    check_same_model(path, bits, inventory)
    check_convertible(model, bits, inventory, options.profile, example)
    module = convert(model, bits, options).module
    with brevitas.keeping_quantizers():
        try:
            module.load_state_dict(_with_biases(module, document["state_dict"]), strict=True)
        except RuntimeError as error:
            raise FormatError(f"{path} does not fit the model: {error}. It was saved from another one.") from error
    return attach_bits(record(module.eval(), options=options), bits)


def _with_biases(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Give layers the biases that preparing them created (merged normalisations), and return the state."""
    for name, layer in module.named_modules():
        if f"{name}.bias" in state and getattr(layer, "bias", 0) is None:
            layer.bias = nn.Parameter(torch.zeros_like(state[f"{name}.bias"]))
    return state
