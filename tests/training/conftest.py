"""One small network in float, fake-quantized by hand, and prepared by both adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.adapter.base import AbstractAdapter
from mpq_plugins.digits import DigitsNet, digits


class Round(nn.Module):
    """A parametrization that rounds a weight to multiples of 1/16, straight through."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (torch.round(weight * 16) / 16 - weight).detach()


class Mobile(nn.Module):
    """A strided, a depthwise dilated and a pointwise convolution, a functional kernel and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.BatchNorm2d(8)
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1) * 0.3)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.bn2(self.depthwise(x)))
        x = torch.relu(torch.conv2d(x, self.kernel))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """A quantized module in training mode, and a function that gives the weight each layer computes with."""

    module: nn.Module
    bits: BitConfig
    quantized_weights: Callable[[], Mapping[str, Tensor]]


def uniform(net: nn.Module, precision: Precision, *, leave_out: tuple[str, ...] = ()) -> BitConfig:
    inventory = find_layers(net, digits(train=True)[0].inputs)
    layers = {layer.name: precision for layer in inventory if layer.name not in leave_out}
    return BitConfig(layers, inventory.fingerprint)


def _plain(net: nn.Module) -> Case:
    bits = uniform(net, Precision(4, 8))
    layers = {name: getattr(net, name) for name in bits.layers}
    for name, layer in layers.items():
        owner, attribute = (layer, "weight") if isinstance(layer, nn.Module) else (net, name)
        nn.utils.parametrize.register_parametrization(owner, attribute, Round())
    return Case(net, bits, lambda: {n: torch.round(_float_weight(net, n) * 16) / 16 for n in bits.layers})


def _float_weight(net: nn.Module, name: str) -> Tensor:
    layer = getattr(net, name)
    if isinstance(layer, Tensor):
        return net.parametrizations[name].original.detach()
    return layer.parametrizations.weight.original.detach()


def _brevitas(net: nn.Module) -> Case:
    from mpq_brevitas import BrevitasAdapter

    bits = uniform(net, Precision(4, 4), leave_out=("kernel",))
    module = _prepared(BrevitasAdapter(), net, bits)

    def weights() -> Mapping[str, Tensor]:
        return {name: module.get_submodule(name).quant_weight().value.detach() for name in bits.layers}

    return Case(module, bits, weights)


def _nncf(net: nn.Module) -> Case:
    from mpq_nncf import NNCFAdapter
    from mpq_nncf.codes import quantized_weight
    from mpq_nncf.wiring import wiring_of

    bits = uniform(net, Precision(4, 4))
    module = _prepared(NNCFAdapter(), net, bits)
    return Case(module, bits, lambda: {n: quantized_weight(module, layer) for n, layer in wiring_of(module).items()})


def _prepared(adapter: AbstractAdapter, net: nn.Module, bits: BitConfig) -> nn.Module:
    batches = digits(train=True)[:2]
    return adapter.prepare(net.eval(), bits, batches[0].inputs, batches)


MAKERS = {"plain": _plain, "brevitas": _brevitas, "nncf": _nncf}
NETS = {"mobile": Mobile, "digits": DigitsNet}


@functools.cache
def _case(net: str, kind: str) -> Case:
    torch.manual_seed(0)
    return MAKERS[kind](NETS[net]())


@pytest.fixture(scope="session")
def images() -> Tensor:
    return digits(train=True)[0].inputs[:16]


@pytest.fixture(scope="session")
def labels() -> Tensor:
    return digits(train=True)[0].labels[:16]


@pytest.fixture
def case() -> Callable[[str, str], Case]:
    """A quantized module of a net, made once and put back as it was after each test."""
    used: list[tuple[Case, dict[str, Tensor]]] = []

    def get(net: str, kind: str) -> Case:
        made = _case(net, kind)
        state = {name: tensor.clone() for name, tensor in [*made.module.named_parameters(), *made.module.named_buffers()]}
        used.append((made, state))
        made.module.train()
        return made

    yield get
    for made, state in used:
        with torch.no_grad():
            for name, tensor in [*made.module.named_parameters(), *made.module.named_buffers()]:
                tensor.copy_(state[name])
                tensor.grad = None


@pytest.fixture(scope="session", autouse=True)
def _nncf_ready(images):
    """Run NNCF once while the cache is the user's own: in a test's, it would compile its extension again."""
    _case("mobile", "nncf").module(images)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
