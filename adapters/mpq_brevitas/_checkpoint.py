"""Checkpoints of quantized modules: tensors and JSON, nothing that unpickles code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq_brevitas import _brevitas_internals as brevitas
from mpq_brevitas import _finn, _layerwise
from mpq_brevitas._recipe import Recipe, attach_recipe, recipe_of
from mpq_brevitas._support import check_convertible
from mpq_plugins._adapter import attach_bits, bits_of
from mpq_plugins._bits import BitConfig
from mpq_plugins._discover import find_layers
from mpq_plugins._errors import FingerprintError, FormatError
from mpq_plugins._files import check_keys, write_whole
from mpq_plugins._precision import Precision

FORMAT, _ADAPTER = "mpq-module/1", "brevitas"
_KEYS = {"format", "adapter", "recipe", "bits", "state_dict"}


def save(module: nn.Module, path: str | Path) -> Path:
    """Write tensors, bits and recipe; a module that is being trained can be saved at any time."""
    bits = bits_of(module)
    layers = {name: [precision.weight, precision.activation] for name, precision in bits.layers.items()}
    document = {
        "format": FORMAT,
        "adapter": _ADAPTER,
        "recipe": json.dumps(recipe_of(module).to_json(), sort_keys=True),
        "bits": json.dumps(
            {"fingerprint": bits.fingerprint, "layers": layers, "origin": dict(bits.origin), "costs": dict(bits.costs)}
        ),
        "state_dict": {name: tensor.detach() for name, tensor in module.state_dict().items()},
    }
    return write_whole(path, lambda temporary: torch.save(document, temporary))


def load(model: nn.Module, path: str | Path, example: Any) -> nn.Module:
    """Convert the float `model` again, without calibration, and fill in the saved tensors."""
    document = _read(path)
    recipe, bits = _recipe(document), _bits(document)
    inventory = find_layers(model, example)
    if bits.fingerprint != inventory.fingerprint:
        raise FingerprintError(
            f"{path} was prepared from another model: its layers have fingerprint {bits.fingerprint[:19]}..., this model's "
            f"{inventory.fingerprint[:19]}.... Give the model it was prepared from."
        )
    check_convertible(model, bits, inventory, recipe.profile)
    module = _finn.convert(model, bits, recipe).module if recipe.profile == "finn" else _layerwise.convert(model, bits, recipe)
    with brevitas.keeping_quantizers():
        try:
            module.load_state_dict(_with_biases(module, document["state_dict"]), strict=True)
        except RuntimeError as error:
            raise FormatError(f"{path} does not fit the model: {error}. It was saved from another one.") from error
    attach_recipe(module, recipe)
    return attach_bits(module.eval(), bits)


def _read(path: str | Path) -> dict[str, Any]:
    try:
        document = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}. Check the path and its permissions.") from error
    except (RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        # torch's own text advises weights_only=False, which would run whatever code the file holds.
        raise FormatError(
            f"{path} is no checkpoint, or a damaged one ({type(error).__name__}). "
            "Give the file that save() or `mpq apply` wrote."
        ) from error
    found = (document.get("format"), document.get("adapter")) if isinstance(document, dict) else (None, None)
    if found != (FORMAT, _ADAPTER):
        raise FormatError(
            f"{path} has format {found[0]!r} of adapter {found[1]!r}, expected {FORMAT!r} of {_ADAPTER!r}. "
            "Load it with the adapter that saved it."
        )
    check_keys(document, allowed=_KEYS, required=_KEYS, where=str(path))
    return document


def _recipe(document: dict[str, Any]) -> Recipe:
    return Recipe(**json.loads(document["recipe"]))


def _bits(document: dict[str, Any]) -> BitConfig:
    saved = json.loads(document["bits"])
    layers = {name: Precision(*precision) for name, precision in saved.pop("layers").items()}
    return BitConfig(layers, **saved)


def _with_biases(module: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """Give layers the biases that preparing them created (merged normalisations), and return the state."""
    for name, layer in module.named_modules():
        if f"{name}.bias" in state and getattr(layer, "bias", 0) is None:
            layer.bias = nn.Parameter(torch.zeros_like(state[f"{name}.bias"]))
    return state
