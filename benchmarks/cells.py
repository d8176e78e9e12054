"""What the accuracy benchmarks share: networks with their data, bit configurations, results that survive a stop."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from glyphs import glyphs, trained_glyph_net
from small_nets import SMALL_NETS

import mpq_plugins as mpq
from mpq_plugins.adapter.evaluate import accuracy
from mpq_plugins.common.files import write_json
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.proxies import LossIncrease
from mpq_plugins.proxies.measuring import keeping_measurements
from mpq_plugins.space.bits import BitConfig
from mpq_plugins.training import reestimate_batch_norm, with_negative_padding

PADDED = "mobilenet_v3 padded"
NETS = ("digits", *SMALL_NETS, PADDED)
BITS = ("w4a4", "w3a3", "mixed")
RESULTS = Path(__file__).parent / "results"  # what the tables of the docs were printed from
_FORMAT = "mpq-benchmark-cells/1"


@dataclass(frozen=True)
class Case:
    """A float network, batches to calibrate with and to test on."""

    name: str
    net: torch.nn.Module
    calibration: list
    test: list

    @property
    def example(self):
        """One image."""
        return self.test[0].inputs[:1]


def load_case(name, n_test, n_calibration=512):
    """`digits`, or a glyph network (trained for a few minutes at its first use, then kept); "padded" with negative padding."""
    if name == "digits":
        return Case(name, trained_digits_net(), digits(train=True)[:8], digits(train=False, batch_size=300))
    # The rounds up to 6 trained the float network, those from 7 on train the quantized one.
    calibration = glyphs(train=True, n_images=n_calibration, batch_size=128, seed=6)
    test = glyphs(train=False, n_images=n_test, batch_size=250)
    net = trained_glyph_net(name.removesuffix(" padded"))
    if name == PADDED:
        net = with_negative_padding(net, test[0].inputs[:1]).model
        reestimate_batch_norm(net, calibration)  # borders give what they did not
    return Case(name, net, calibration, test)


def bits_of_case(case, text, folder):
    """`w4a4` for every layer, or `mixed`: weights 2 to 8, activations 3 to 8, at the size and bit operations of w3a4.

    First and last layer stay at w8a8. The mixed configuration is the least measured loss increase, ties of NNCF kept, so
    that both adapters can have it.
    """
    from mpq_nncf import NNCFAdapter

    path = Path(folder) / f"{case.name}-{text}.bits.json"
    if path.exists():
        return BitConfig.load(path)
    inventory = mpq.find_layers(case.net, case.example)
    if text != "mixed":
        pins = mpq.first_and_last(inventory)
        layers = {layer.name: mpq.Precision.parse(str(pins.get(layer.name, text))) for layer in inventory}
        bits = BitConfig(layers, inventory.fingerprint)
    else:
        with keeping_measurements(Path(folder) / "measurements"):
            allocation = mpq.allocate(
                case.net,
                case.example,
                case.calibration,
                proxy=LossIncrease(n_images=128),
                budgets={"size": "w3", "bops": "w3a4"},
                choices=mpq.menu(range(2, 9), (3, 4, 5, 6, 8)),
                adapter=NNCFAdapter(),
                pin_first_last=True,
            )
        bits = allocation.bits
    bits.save(path)
    return bits


class Cells:
    """Results by key, written after each one: a stopped benchmark goes on where it was."""

    def __init__(self, path):
        self.path = Path(path)
        self.found = json.loads(self.path.read_text())["cells"] if self.path.exists() else {}

    def get(self, key, measure):
        """The result under `key`, measured now if it is not there yet."""
        if key not in self.found:
            start = time.process_time()
            result = measure()
            self.found[key] = {
                "cpu_seconds": round(time.process_time() - start, 1),
                **result,
            }  # its own figure, of a subprocess
            # Several processes may fill one file in turn.
            others = json.loads(self.path.read_text())["cells"] if self.path.exists() else {}
            self.found = {**others, **self.found}
            write_json(self.path, {"format": _FORMAT, "cells": self.found})
            print(key, {name: value for name, value in self.found[key].items() if name != "curve"}, flush=True)
        return self.found[key]


def measured_accuracy(module, test):
    """Accuracy in percent."""
    return round(100 * accuracy(module, test), 2)
