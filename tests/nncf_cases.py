"""Small nets with mixed bits, prepared by the NNCF adapter."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpq_nncf import NNCFAdapter
from nncf_nets import Attention, Residual, Zoo, chain, images, trained
from torch import Tensor, nn

from mpq_plugins import BitConfig, Precision, find_layers

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
        activation.update(dict.fromkeys(group, activation[group[0]]))
    return BitConfig({name: Precision(weight[name], activation[name]) for name in weight}, inventory.fingerprint)


def make(net: str, adapter: NNCFAdapter, **options: Any) -> Prepared:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = trained(NETS[net]())
    example = images(4, seed=3)[0]
    bits = mixed_bits(model, example, adapter)
    return Prepared(model, bits, adapter.prepare(model, bits, example, calibration(), **options), example)
