"""Scores, bits and weight codes of three networks are those stored when the package was laid out anew.

`python tests/test_as_before.py` stores them again; do that only where a change of results is meant, and say so in CHANGELOG.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from mpq_nncf import NNCFAdapter
from torch import nn

import mpq_plugins as mpq
from mpq_plugins.common.plugins import make

STORED = Path(__file__).parent / "stored" / "as_before.json"
IMAGES = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(1))
BATCHES = [(part, None) for part in IMAGES.split(8)]
ADAPTERS = {"nncf": NNCFAdapter, "layerwise": BrevitasAdapter, "finn": lambda: BrevitasAdapter("finn")}
PROXIES = {
    "weight-error": {},
    "output-error": {"n_images": 16},
    "kl-divergence": {"n_images": 16},
    "fisher": {"n_images": 16},
    "hessian-trace": {"n_images": 16, "n_probes": 2},
    "ompq": {},
    "csmpq": {},
    "clado": {"tier": "gram", "n_images": 16},
    "clado fisher": {"tier": "fisher", "n_images": 16},
}


class Residual(nn.Module):
    """Two convolutions around which the input goes, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        y = self.second_norm(self.second(torch.relu(self.first_norm(self.first(x)))))
        return self.classifier(torch.relu(x + y).mean((2, 3)))


def depthwise():
    """A point, a depthwise and a point convolution, with ReLU6."""
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


def perceptron():
    """Linear layers only."""
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))


NETWORKS = {"residual": Residual, "depthwise": depthwise, "perceptron": perceptron}


def network(name):
    """With weights and statistics that are not those of the start."""
    torch.manual_seed(0)
    net = NETWORKS[name]()
    with torch.no_grad():
        for _ in range(4):
            net.train()(IMAGES)
    return net.eval()


def scores_of(name):
    """Per proxy losses, and cross terms where it has them, over weights of 2, 4 and 8 bits and activations of 4 and 8."""
    net = network(name)
    space = mpq.build_space(net, IMAGES[:1], choices=mpq.menu((2, 4, 8), (4, 8)))
    return {own: make("proxies", own.split()[0], options).score(net, space, BATCHES) for own, options in PROXIES.items()}


def bits_of(scores):
    """At the size of 4 bits and the bit operations of w4a6."""
    found = mpq.solve_scores(scores, {"size": "w4", "bops": "w4a6"})
    return {layer: str(precision) for layer, precision in found.bits.layers.items()}


def codes_of(name, adapter):
    """Checksums of the weight codes of a prepared module, its own bits being w2 to w8 in turn, and its outputs."""
    net = network(name)
    inventory = mpq.find_layers(net, IMAGES[:1])
    widths = [(4, 8, 3, 6)[i % 4] for i in range(len(list(inventory)))]
    bits = mpq.BitConfig(
        {layer.name: f"w{width}a8" for layer, width in zip(inventory, widths, strict=True)}, inventory.fingerprint
    )
    module = adapter.prepare(net, bits, IMAGES[:1], BATCHES)
    with torch.no_grad():
        outputs = module(IMAGES[:2])
    codes = {
        layer: zlib.crc32(np.ascontiguousarray(np.asarray(own), dtype=np.int64)) for layer, own in adapter.codes(module).items()
    }
    return {"codes": codes, "outputs": [round(float(value), 4) for value in outputs.flatten()]}


def stored():
    """What is compared with."""
    return json.loads(STORED.read_text())


@pytest.mark.parametrize("name", NETWORKS)
def test_scores_and_bits(name):
    """Equal up to the rounding of another processor; bits are equal."""
    before = stored()[name]
    for own, scores in scores_of(name).items():
        largest = max(abs(value) for row in before["loss"][own] for value in row)
        for now, then in zip(scores.loss, before["loss"][own], strict=True):
            assert now == pytest.approx(then, rel=1e-4, abs=1e-5 * largest), own
        if scores.pairwise is not None:
            then = np.array(before["pairwise"][own])
            assert np.allclose(scores.pairwise, then, rtol=1e-3, atol=1e-4 * np.abs(then).max()), own
        assert bits_of(scores) == before["bits"][own], own


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_codes(name, adapter):
    """Every weight code is as it was, and the outputs are to four digits."""
    now, before = codes_of(name, ADAPTERS[adapter]()), stored()[name]["modules"][adapter]
    assert now["codes"] == before["codes"]
    assert now["outputs"] == pytest.approx(before["outputs"], abs=2e-3)


def store():
    """Write the file."""
    found = {}
    for name in NETWORKS:
        scores = scores_of(name)
        found[name] = {
            "loss": {own: [list(row) for row in value.loss] for own, value in scores.items()},
            "pairwise": {own: value.pairwise.tolist() for own, value in scores.items() if value.pairwise is not None},
            "bits": {own: bits_of(value) for own, value in scores.items()},
            "modules": {adapter: codes_of(name, make_one()) for adapter, make_one in ADAPTERS.items()},
        }
    STORED.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    store()
