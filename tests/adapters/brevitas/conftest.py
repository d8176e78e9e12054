"""Prepared modules and exported files, made once per session."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from brevitas_nets import CASES, mixed_bits, network
from mpq_brevitas import BrevitasAdapter
from torch import nn

from mpq_plugins import BitConfig
from mpq_plugins.model.run import call, tensors


@dataclass(frozen=True)
class Prepared:
    """A case taken through `prepare`."""

    adapter: BrevitasAdapter
    model: nn.Module
    bits: BitConfig
    module: nn.Module
    example: object

    def outputs(self, module: nn.Module | None = None) -> list[np.ndarray]:
        with torch.no_grad():
            return [tensor.numpy() for tensor in tensors(call(module or self.module, self.example))]


@functools.cache
def _prepared(name: str, profile: str) -> Prepared:
    adapter, model, example = BrevitasAdapter(profile), network(name), CASES[name].example()
    bits = mixed_bits(name, model)
    return Prepared(adapter, model, bits, adapter.prepare(model, bits, example, [(example, None)]), example)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prepared() -> Callable[..., Prepared]:
    return lambda name, profile="layerwise": _prepared(name, profile)


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("exported")

    @functools.cache
    def export(name: str, profile: str = "layerwise", format: str = "qonnx") -> Path:
        case = _prepared(name, profile)
        return case.adapter.export(case.module, folder / f"{name}-{profile}-{format}.onnx", case.example, format=format)

    return export
