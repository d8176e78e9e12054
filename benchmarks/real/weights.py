"""Networks with quantized weights and float activations, by the reference quantizer of the core."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from mpq_plugins import Space, find_layers, first_and_last, menu
from mpq_plugins.proxies.measuring.weights import QuantizedWeights

_CACHE = 2**28


class Weights:
    """The quantized weights of a network at 2 to 8 bits, per channel at the step of least squared error."""

    def __init__(self, net: nn.Module, example: object) -> None:
        self.net = net
        self.inventory = find_layers(net, example)
        self.names = [layer.name for layer in self.inventory]
        self.counts = [layer.n_weights for layer in self.inventory]
        space = Space.build(self.inventory, menu(range(2, 9)))
        self._weight_names = {layer.name: layer.weight_name for layer in self.inventory}
        self._variants = QuantizedWeights(net, space, cache_bytes=_CACHE)

    @torch.no_grad()
    def at(self, bits: Mapping[str, int]) -> nn.Module:
        """A copy of the network with these weight bits."""
        module = copy.deepcopy(self.net)
        for name, width in bits.items():
            module.get_parameter(self._weight_names[name]).copy_(self._variants.weight(name, width))
        return module

    def uniform(self, width: int, *, pinned: bool) -> dict[str, int]:
        """All layers at `width`; first and last at 8 with `pinned`."""
        pins = first_and_last(self.inventory) if pinned else {}
        return {name: 8 if name in pins else width for name in self.names}

    def average(self, bits: Mapping[str, int]) -> float:
        """Bits per weight over all layers."""
        return sum(bits[name] * n for name, n in zip(self.names, self.counts, strict=True)) / sum(self.counts)
