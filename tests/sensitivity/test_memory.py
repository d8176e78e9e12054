"""What does not change the result: memory, the cut into batches, stacking; and what measuring leaves behind."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from mpq_plugins import Batch, Space, find_layers, menu
from mpq_plugins.proxies import CLADO
from mpq_plugins.proxies.measuring import Engine, MeasurementOptions, SensitivityRun


class Net(nn.Module):
    """Normalisation, a shortcut, in-place changes, a depthwise convolution and one with a computed weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.depthwise, self.drop = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Dropout(0.5)
        self.shortcut = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.stem(x)))
        y = self.depthwise(x)
        y += self.shortcut(x)
        return self.head(self.drop(self.relu(y).mean((2, 3))))


def made(n_choices=3):
    torch.manual_seed(0)
    model = Net().eval()
    return model, Space.build(find_layers(model, torch.zeros(1, 3, 10, 10)), menu(range(2, 2 + n_choices), (8,)))


def batches(*sizes, size=10):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(sum(sizes), 3, size, size, generator=generator)
    labels = torch.randint(5, (sum(sizes),), generator=generator)
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


def same(one, other):
    """Two effects agree to rounding in float32."""
    for name in ("base_loss", "losses", "slopes", "curvature", "pairs"):
        expected = np.asarray(getattr(other, name))
        np.testing.assert_allclose(
            getattr(one, name), expected, rtol=2e-3, atol=2e-6 * max(1e-9, np.abs(expected).max()) + 1e-7
        )


def test_little_memory_cuts_batches_into_pieces():
    """With next to no memory every image runs alone, and the result is that of one piece."""
    model, space = made()
    large = batches(20, size=64)
    little, ample = (
        SensitivityRun(model, space, large, MeasurementOptions(correction=False, memory_mb=memory)) for memory in (1, 1024)
    )
    assert len(list(ample.engine.pieces(ample.batches[0]))) == 1
    pieces = list(little.engine.pieces(little.batches[0]))
    assert len(pieces) > 4
    assert torch.equal(torch.cat([piece.inputs for piece in pieces]), large[0][0])
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), large[0][1])
    same(little.effects(pairs=True), ample.effects(pairs=True))


def test_the_cut_into_batches_does_not_matter():
    """Batches of different length, one image among them, give what one batch of all images gives."""
    model, space = made()
    expected = SensitivityRun(model, space, batches(12), MeasurementOptions(correction=False)).effects(pairs=True)
    for sizes in ((5, 1, 6), (1, 11), (11, 1)):
        same(SensitivityRun(model, space, batches(*sizes), MeasurementOptions(correction=False)).effects(pairs=True), expected)


def test_the_number_of_images_is_kept():
    """Of three batches, seven images are the first batch and part of the second; no further batch is asked for."""
    model, space = made()

    def loader():
        yield from batches(5, 5, 5)[:2]
        raise AssertionError("a batch too many")

    lab = SensitivityRun(model, space, loader(), MeasurementOptions(correction=False, n_images=7))
    assert list(map(len, lab.batches)) == [5, 2]
    first = batches(5, 5, 5)
    cut = [first[0], (first[1][0][:2], first[1][1][:2])]
    same(lab.effects(pairs=True), SensitivityRun(model, space, cut, MeasurementOptions(correction=False)).effects(pairs=True))


@pytest.mark.parametrize(("n_images", "n_example"), [(1, 4), (3, 4), (1, 1)])
def test_stacked_variants_are_single_ones(n_images, n_example):
    """All choices in one pass, whatever their order, give what they give one by one; an example of one image will do."""
    model, space = made(n_choices=7)
    batch = Batch(*batches(n_images)[0])
    engine = Engine.start(model, space, Batch(*batches(n_example)[0]))
    assert engine.stacking
    assert engine.player is not None
    assert engine.player.tape.stackable
    run = engine.run(batch)
    for unit in range(len(space.units)):
        alone = torch.stack([next(run.single(unit, [choice])) for choice in range(7)])
        torch.testing.assert_close(torch.stack(list(run.single(unit, range(7)))), alone, rtol=1e-4, atol=1e-6)
        backwards = list(run.single(unit, range(6, -1, -1)))
        torch.testing.assert_close(torch.stack(backwards[::-1]), alone, rtol=1e-4, atol=1e-6)


def test_fewer_layers_run_than_in_whole_passes():
    """A change of the head runs the head alone; whole passes run all four layers."""
    model, space = made(n_choices=2)
    runs = {}
    for replay in (True, False):
        engine = Engine.start(model, space, Batch(*batches(4)[0]), replay=replay)
        run = engine.run(Batch(*batches(4)[0]))
        before = engine.counter.run
        list(run.single(3, (0, 1)))
        runs[replay] = engine.counter.run - before
    assert runs == {True: 2 * 4, False: 2 * 4 * 4}


@pytest.mark.parametrize("tier", ["fisher", "gram", "exact"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(tier, fails):
    """State, modes, hooks, gradients and the random state come back, also when measuring fails half-way."""
    model, space = made()
    model.train()
    model.norm.eval()
    model.stem.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = batches(4, 4)
    if fails:
        found[1][0][2, 0, 0, 0] = torch.nan
        with pytest.raises(Exception, match="not finite"):
            CLADO(tier=tier).score(model, space, found)
    else:
        CLADO(tier=tier).score(model, space, found)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in (model.stem.weight, model.stem.bias)] == [False, True]
