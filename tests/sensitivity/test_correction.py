"""Corrected runs against copies of the model whose statistics and biases are moved module by module, run whole."""

import copy

import hard_nets
import numpy as np
import pytest
import torch
from hard_nets import HARD, IMAGES, ROWS, made, output_of
from naive_loops import NaiveLoop, corrected_copy, with_statistics
from torch import nn

from mpq_plugins import Batch, Space, find_layers, menu
from mpq_plugins.sensitivity import Engine, Lab, Setup

# One module has one bias and one set of statistics, and in these nets is called once.
ONCE = [row for row in HARD if row[0] not in (hard_nets.Calls, hard_nets.LibraryAttention)]
once = pytest.mark.parametrize(
    ("build", "inputs"),
    [row[:2] for row in ONCE],
    ids=[f"{build.__name__}-{type(inputs).__name__}" for build, inputs, _ in ONCE],
)
CLOSE = {"rtol": 0, "atol": 1e-9}


@once
@pytest.mark.parametrize("how", ["replayed", "unfolded", "plain"])
def test_every_unit_and_every_pair_equals_a_prepared_copy(build, inputs, how):
    """Outputs with one and with two units quantized are those of copies with moved statistics and biases, to 1e-9."""
    model, space = made(build, inputs)
    naive = NaiveLoop(model, space, [(inputs, None)], output=output_of(model), correction=True)
    options = {"replay": how != "plain", "folding": how == "replayed"}
    engine = Engine.start(model, space, Batch(inputs), output=output_of(model), correction=True, **options)
    run = engine.run(Batch(inputs))
    torch.testing.assert_close(run.output, NaiveLoop(model, space, [(inputs, None)], output=output_of(model)).logits(), **CLOSE)
    for unit in range(len(space.units)):
        for choice, output in enumerate(run.single(unit, (0, 1))):
            torch.testing.assert_close(output, naive.logits((unit, choice)), **CLOSE)
    for unit in range(len(space.units)):
        under = run.under(unit, 0)
        for other in range(len(space.units)):
            if other != unit:
                for choice, output in enumerate(under.single(other, (0, 1))):
                    torch.testing.assert_close(output, naive.logits((unit, 0), (other, choice)), **CLOSE)
