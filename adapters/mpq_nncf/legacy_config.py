"""The bits as a JSON configuration of NNCF 2.x, for pipelines that still use `create_compressed_model`.

NNCF 2.x names an operation by the classes and attributes on the way to it, `ResNet/Sequential[layer1]/BasicBlock[0]/
NNCFConv2d[conv1]/conv2d_0`, its quantizers `...|WEIGHT`, `...|OUTPUT` and `...|INPUT0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpq_nncf import nncf_setup
from mpq_nncf.groups import traced_copy
from mpq_nncf.internals import quiet
from mpq_nncf.options import NNCFOptions
from mpq_nncf.wiring import calls_of, owners
from mpq_plugins.common.files import write_json
from mpq_plugins.model.discover import find_layers
from mpq_plugins.space.bits import BitConfig

# NNCF 2.x replaces modules of exactly these classes by its own, named with the prefix NNCF.
_WRAPPED = frozenset(
    "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Linear Embedding EmbeddingBag "
    "BatchNorm1d BatchNorm2d BatchNorm3d GroupNorm LayerNorm".split()
)


def write_legacy_config(model: nn.Module, bits: BitConfig, example: Any, path: str | Path) -> Path:
    """Write a configuration with `bitwidth_per_scope` for target device TRIAL, the only one that takes any width."""
    precision = {"type": "manual", "bitwidth_per_scope": bitwidth_per_scope(model, bits, example)}
    document = {
        "input_info": _input_info(example),
        "target_device": "TRIAL",
        "compression": {"algorithm": "quantization", "initializer": {"precision": precision}},
    }
    return write_json(path, document)


def bitwidth_per_scope(model: nn.Module, bits: BitConfig, example: Any) -> list[list[Any]]:
    """Pairs of bits and scope: each weight, then each activation quantizer that feeds a layer.

    Where NNCF's default placement, which also quantizes residual adds, feeds layers of different activation bits from one
    quantizer, the widest counts. Raises `UnknownLayerError` and `FingerprintError`.
    """
    inventory = find_layers(model, example)
    bits.check(inventory)
    graph = traced_copy(model, example)
    calls = calls_of([layer for layer in inventory if layer.name in bits.layers], graph)
    owner = owners(calls)
    with quiet():
        setup = nncf_setup.plan(graph, NNCFOptions(), ignored=())
    inputs = nncf_setup.input_names(graph)
    rows: list[list[Any]] = [
        [bits[name].weight, f"{_scope(model, op.name)}|WEIGHT"] for name, ops in calls.items() for op in ops
    ]
    for point in nncf_setup.points(setup):
        asked = [bits[owner[operation]].activation for operation in point.operations if operation in owner]
        if asked and not point.is_weight:
            place = f"/nncf_model_input_{inputs.index(point.target)}" if point.target in inputs else _scope(model, point.target)
            end = "OUTPUT" if point.port is None else f"INPUT{point.port}"
            rows.append([max(asked), f"{place}|{end}"])
    return rows


def _scope(model: nn.Module, operation: str) -> str:
    """NNCF 3's operation name in NNCF 2.x's words."""
    *path, function, call = operation.split("/")
    scope, module = [type(model).__name__], model
    for attribute in filter(None, path):
        module = module.get_submodule(attribute)
        name = type(module).__name__
        scope.append(f"{'NNCF' if name in _WRAPPED else ''}{name}[{attribute}]")
    return "/".join([*scope, f"{function}_{call}"])


def _input_info(example: Any) -> list[dict[str, Any]]:
    if isinstance(example, Mapping):
        return [
            {"sample_size": list(value.shape), "keyword": key} for key, value in example.items() if isinstance(value, Tensor)
        ]
    values = example if isinstance(example, (tuple, list)) else (example,)
    return [{"sample_size": list(value.shape)} for value in values if isinstance(value, Tensor)]
