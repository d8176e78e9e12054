"""Replays against whole forward passes of deep copies, on models that are hard to replay."""

import pytest
import torch
from hard_nets import HARD, ROWS, made, output_of
from naive_loops import NaiveLoop
from torch import nn

from mpq_plugins import Batch, Space, find_layers, menu
from mpq_plugins.proxies.measuring import Engine

hard = pytest.mark.parametrize(
    ("build", "inputs", "replays"), HARD, ids=[f"{build.__name__}-{type(inputs).__name__}" for build, inputs, _ in HARD]
)


@hard
def test_hard_models_are_replayed_or_run_plainly(build, inputs, replays):
    """What can be replayed is, and the rest says why it is not."""
    model, space = made(build, inputs)
    engine = Engine.start(model, space, Batch(inputs), output=output_of(model))
    assert (engine.player is not None) is replays, engine.why_plain
    assert bool(engine.why_plain) is not replays


@hard
@pytest.mark.parametrize("folding", [True, False])
def test_every_unit_and_every_pair_equals_whole_passes(build, inputs, replays, folding):
    """Outputs with one and with two units quantized are those of deep copies run whole, to 1e-9 in float64."""
    model, space = made(build, inputs)
    naive = NaiveLoop(model, space, [(inputs, None)], output=output_of(model))
    engine = Engine.start(model, space, Batch(inputs), output=output_of(model), folding=folding)
    run = engine.run(Batch(inputs))
    torch.testing.assert_close(run.output, naive.logits(), rtol=0, atol=1e-9)
    for unit in range(len(space.units)):
        for choice, output in enumerate(run.single(unit, (0, 1))):
            torch.testing.assert_close(output, naive.logits((unit, choice)), rtol=0, atol=1e-9)
    for unit in range(len(space.units)):
        under = run.under(unit, 0)
        for other in range(len(space.units)):
            if other != unit:
                for choice, output in enumerate(under.single(other, (0, 1))):
                    torch.testing.assert_close(output, naive.logits((unit, 0), (other, choice)), rtol=0, atol=1e-9)
    torch.testing.assert_close(run.output, naive.logits(), rtol=0, atol=1e-9)  # no pass wrote over what it was served


class BySize(nn.Module):
    """Takes another path for many images."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x)) if len(x) > 2 else self.b(self.a(x).relu())


def test_a_path_that_depends_on_the_number_of_images_is_run_plainly():
    """What was recorded with one and two images does not hold for three, which are not replayed."""
    model, space = made(BySize, ROWS)
    engine = Engine.start(model, space, Batch(ROWS))
    assert engine.player is not None
    naive = NaiveLoop(model, space, [(ROWS, None)])
    run = engine.run(Batch(ROWS))
    torch.testing.assert_close(torch.stack(list(run.single(0, (0, 1)))), torch.stack([naive.logits((0, c)) for c in (0, 1)]))


def test_replays_are_checked_at_the_widest_activations(monkeypatch):
    """One flipped code of a narrow activation is no fault of a replay: no choice that is compared has one."""
    compared = []
    changes = Engine.changes

    def noted(engine, choices, **options):
        compared.extend(engine.space.units[unit].choices[at] for unit, at in choices.items())
        return changes(engine, choices, **options)

    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    space = Space.build(find_layers(model, ROWS), menu((2, 4, 8), (2, 4, 8)))
    monkeypatch.setattr(Engine, "changes", noted)
    assert Engine.start(model, space, Batch(ROWS)).player is not None
    assert {choice.activation for choice in compared} == {8}
