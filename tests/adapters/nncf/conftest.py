"""Prepared modules, shared by the tests that only read them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Before nncf or openvino is imported: send no telemetry, and wait for the compilation of NNCF's extension.
os.environ["CI"] = "true"
os.environ["NNCF_CI"] = "1"
os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"

import pytest
import torch
from nncf_nets import Attention, Residual, Zoo, chain, images, trained
from torch import Tensor, nn

from mpq_nncf import NNCFAdapter
from mpq_plugins import BitConfig, Precision, find_layers

pytest.importorskip("nncf")
pytest.importorskip("openvino")

NETS: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "zoo": Zoo, "attention": Attention, "chain": chain}


@dataclass(frozen=True)
class Prepared:
    """A trained float model, mixed bits for it, and the quantized module."""

    model: nn.Module
    bits: BitConfig
    module: nn.Module
    example: Tensor


def calibration() -> list[Any]:
    return [images(32, seed=seed) for seed in (10, 11)]


def mixed_bits(model: nn.Module, example: Any, adapter: NNCFAdapter, *, seed: int = 1) -> BitConfig:
    """Weights and activations of 2 to 8 bits, agreeing where a weight or an activation quantizer is shared."""
    inventory = find_layers(model, example)
    generator = random.Random(seed)
    weight = {layer.name: generator.randint(2, 8) for layer in inventory}
    activation = {layer.name: generator.randint(2, 8) for layer in inventory}
    weight.update({layer.name: weight[layer.shares_weight_with] for layer in inventory if layer.shares_weight_with})
    for group in adapter.activation_groups(model, example):
        activation.update({name: activation[group[0]] for name in group})
    return BitConfig({name: Precision(weight[name], activation[name]) for name in weight}, inventory.fingerprint)


def make(net: str, adapter: NNCFAdapter, **options: Any) -> Prepared:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = trained(NETS[net]())
    example = images(4, seed=3)[0]
    bits = mixed_bits(model, example, adapter)
    return Prepared(model, bits, adapter.prepare(model, bits, example, calibration(), **options), example)


@pytest.fixture(scope="session")
def adapter() -> NNCFAdapter:
    return NNCFAdapter()


@pytest.fixture(scope="session")
def prepared(adapter: NNCFAdapter) -> Callable[[str], Prepared]:
    """The prepared module of a net, made once; tests must not change it."""
    made: dict[str, Prepared] = {}

    def get(net: str) -> Prepared:
        if net not in made:
            made[net] = make(net, adapter)
        return made[net]

    return get


@pytest.fixture(scope="session")
def exported(adapter: NNCFAdapter, prepared: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The exported file of a net in a format, written once; tests must copy it before they change it."""
    made: dict[tuple[str, str], Any] = {}

    def get(net: str, format: str) -> Any:
        if (net, format) not in made:
            case = prepared(net)
            path = tmp_path_factory.mktemp("exported") / f"{net}-{format}"
            made[net, format] = adapter.export(case.module, path, case.example, format=format)
        return made[net, format]

    return get
