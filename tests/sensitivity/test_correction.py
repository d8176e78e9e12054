"""Corrected runs against copies of the model whose statistics and biases are moved module by module, run whole."""

import dataclasses

import hard_nets
import numpy as np
import pytest
import torch
from hard_nets import HARD, made, output_of
from naive_loops import NaiveLoop, with_statistics
from torch import nn

from mpq_plugins import Batch, Space, find_layers, menu
from mpq_plugins.proxies import CLADO, Fisher, KLDivergence, LossIncrease, OutputError
from mpq_plugins.proxies.measuring import Engine, MeasurementOptions, SensitivityRun, keeping_measurements
from mpq_plugins.quantizers.uniform import mse_scale, quantize

# One module has one bias and one set of statistics, and in these nets is called once.
ONCE = [row[:2] for row in HARD if row[0] not in (hard_nets.Calls, hard_nets.LibraryAttention)]
once = pytest.mark.parametrize(("build", "inputs"), ONCE, ids=[f"{net.__name__}-{type(x).__name__}" for net, x in ONCE])
CLOSE = {"rtol": 0, "atol": 1e-9}


class Depthwise(nn.Module):
    """Convolutions with norms, one of them depthwise, and a classifier with a bias."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.norm2 = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6, affine=False)
        self.point, self.norm3 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.stem(x)))
        x = torch.relu(self.norm2(self.depthwise(x)))
        return self.head(torch.relu(self.norm3(self.point(x))).mean((2, 3)))


def images(n=10):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels(n=10):
    return torch.arange(n) % 4


def depthwise(**options):
    torch.manual_seed(0)
    model = with_statistics(Depthwise().double(), images(32))
    return model, Space.build(find_layers(model, images(1)), menu((2, 4), (8,)), **options)


@once
@pytest.mark.parametrize("how", ["replayed", "one by one", "unfolded", "plain"])
def test_every_unit_and_every_pair_equals_a_prepared_copy(build, inputs, how):
    """Outputs with one and with two units quantized are those of copies with moved statistics and biases, to 1e-9."""
    model, space = made(build, inputs)
    float_output = NaiveLoop(model, space, [(inputs, None)], output=output_of(model)).logits()
    naive = NaiveLoop(model, space, [(inputs, None)], output=output_of(model), correction=True)
    options = {"replay": how != "plain", "folding": how != "unfolded"}
    engine = Engine.start(model, space, Batch(inputs), output=output_of(model), correction=True, **options)
    run = dataclasses.replace(engine, stacking=engine.stacking and how != "one by one").run(Batch(inputs))
    torch.testing.assert_close(run.output, float_output, **CLOSE)
    for unit in range(len(space.units)):
        for choice, output in enumerate(run.single(unit, (0, 1))):
            torch.testing.assert_close(output, naive.logits((unit, choice)), **CLOSE)
    for unit in range(len(space.units)):
        under = run.under(unit, 0)
        for other in range(len(space.units)):
            if other != unit:
                for choice, output in enumerate(under.single(other, (0, 1))):
                    torch.testing.assert_close(output, naive.logits((unit, 0), (other, choice)), **CLOSE)
    torch.testing.assert_close(run.output, float_output, **CLOSE)  # nothing wrote over what is kept


@pytest.mark.parametrize("replay", [True, False])
def test_pinned_units_are_corrected_in_the_base(replay):
    """With the stem at 2 bits throughout, base and changes have the statistics of the float network to go by."""
    model, space = depthwise(pin={"stem": "w2a8"})
    naive = NaiveLoop(model, space, [(images(), None)], correction=True)
    run = Engine.start(model, space, Batch(images()), correction=True, replay=replay).run(Batch(images()))
    torch.testing.assert_close(run.output, naive.logits(), **CLOSE)
    for unit in range(1, len(space.units)):
        for choice, output in enumerate(run.single(unit, (0, 1))):
            torch.testing.assert_close(output, naive.logits((unit, choice)), **CLOSE)


def log_softmax(logits):
    return logits.double().log_softmax(1).numpy()


@pytest.mark.parametrize("searches_activations", [False, True])
def test_scores_equal_numpy_on_prepared_copies(searches_activations):
    """KL divergence, output error, loss increase and CLADO's pairs are those of whole passes of prepared copies."""
    model, space = depthwise()
    if searches_activations:
        space = Space.build(find_layers(model, images(1)), menu((3,), (3, 8)))
    naive = NaiveLoop(model, space, [(images(), None)], correction=True)
    base, changed = naive.logits(), [naive.logits(option) for option in naive.options]
    p = np.exp(log_softmax(base))

    def cross_entropy(logits):
        return -log_softmax(logits)[np.arange(len(labels())), labels().numpy()].mean()

    wanted = {
        KLDivergence(): [(p * (log_softmax(base) - log_softmax(q))).sum(1).mean() for q in changed],
        OutputError(): [float((q - base).square().mean()) for q in changed],
        LossIncrease(): [cross_entropy(q) - cross_entropy(base) for q in changed],
        CLADO(cross=False): [cross_entropy(q) - cross_entropy(base) for q in changed],
    }
    for proxy, expected in wanted.items():
        scores = proxy.score(model, space, [(images(), labels())])
        np.testing.assert_allclose(np.concatenate(scores.loss), expected, rtol=1e-7, atol=1e-12, err_msg=repr(proxy))
    single, omega = naive.losses(cross_entropy)
    exact = CLADO(tier="exact").score(model, space, [(images(), labels())])
    np.testing.assert_allclose(np.concatenate(exact.loss), single, rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(exact.pairwise, omega, rtol=1e-7, atol=1e-12)


def test_measured_plans_are_prepared_copies():
    """The loss of a whole plan is that of a copy with every layer quantized and then corrected."""
    model, space = depthwise()
    plan = [0, 1, 0, 1]
    logits = NaiveLoop(model, space, [(images(), None)], correction=True).logits(*enumerate(plan))
    expected = torch.nn.functional.cross_entropy(logits, labels())
    found = SensitivityRun(model, space, [(images(), labels())], MeasurementOptions()).losses_at([plan])
    assert found[0] == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("replay", [True, False])
def test_nothing_moves_where_quantization_does_nothing(replay):
    """Weights that lie on the grid leave the output as it is, to the last bit."""
    model, space = depthwise()
    with torch.no_grad():
        for unit in space.units:
            weight = model.get_submodule(unit.name).weight
            weight.copy_(quantize(weight, mse_scale(weight, 2), 2).mul_(mse_scale(weight, 2)))
            scale = mse_scale(weight, 2)
            assert torch.equal(quantize(weight, scale, 2).mul_(scale), weight)
    run = Engine.start(model, space, Batch(images()), correction=True, replay=replay).run(Batch(images()))
    for unit in range(len(space.units)):
        [output] = run.single(unit, [0])
        assert torch.equal(output, run.output)


def derivatives(model, space, change_of):
    """<gradient of image n's loss, change of a layer's output> [image, option] with one backward pass per image."""
    rows = np.zeros((len(labels()), 2 * len(space.units)))
    for unit, members in enumerate(space.units):
        module = model.get_submodule(members.name)
        seen = []
        handle = module.register_forward_hook(lambda _module, args, output, seen=seen: seen.append((args[0], output)))
        losses = torch.nn.functional.cross_entropy(model(images()), labels(), reduction="none")
        handle.remove()
        [(value, output)] = seen
        gradients = [torch.autograd.grad(loss, output, retain_graph=True)[0] for loss in losses]
        for choice, precision in enumerate(members.choices):
            scale = mse_scale(module.weight.detach(), precision.weight)
            weight = quantize(module.weight.detach(), scale, precision.weight) * scale
            with torch.no_grad():
                quantized = torch.func.functional_call(module, {"weight": weight}, (value,))
                change = change_of(members.name, output.detach(), quantized)
            rows[:, 2 * unit + choice] = [float((gradient * change).sum()) for gradient in gradients]
    return rows


NORM_OF = {"stem": "norm1", "depthwise": "norm2", "point": "norm3"}


def corrected_change(model):
    """What a change of a layer's output is worth once the norm behind it, or its own bias, is corrected: the formula."""

    def change_of(name, output, quantized):
        if name not in NORM_OF:
            return quantized - output - (quantized - output).mean(0)
        norm = model.get_submodule(NORM_OF[name])
        moved = (quantized.mean((0, 2, 3)) - output.mean((0, 2, 3)))[:, None, None]
        ratio = (quantized.var((0, 2, 3), correction=0) / output.var((0, 2, 3), correction=0)).clamp(0.1, 10)
        mean, variance = norm.running_mean[:, None, None], norm.running_var
        r = ((variance + norm.eps) / (variance * ratio + norm.eps)).sqrt()[:, None, None]
        return (quantized - mean - moved) * r + mean - output

    return change_of


def test_fisher_scores_weigh_corrected_changes():
    """The diagonal Fisher score and the first-order CLADO take the change that the next norm or the bias leaves."""
    model, space = depthwise()
    v = derivatives(model, space, corrected_change(model))
    scores = CLADO(tier="fisher", expansion=True).score(model, space, [(images(), labels())])
    np.testing.assert_allclose(np.concatenate(scores.loss), v.mean(0), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(scores.pairwise, v.T @ v / len(v), rtol=1e-7, atol=1e-12)
    raw = derivatives(model, space, lambda _, output, quantized: quantized - output)
    plain = CLADO(tier="fisher", correction=False, expansion=True).score(model, space, [(images(), labels())])
    np.testing.assert_allclose(np.concatenate(plain.loss), raw.mean(0), rtol=1e-7, atol=1e-12)
    wanted, found = (Fisher(correction=on).score(model, space, [(images(), labels())]).loss for on in (False, True))
    assert all(one != other for one, other in zip(np.concatenate(wanted), np.concatenate(found), strict=True))


def test_fisher_starts_from_the_corrected_base():
    """With a unit pinned at 2 bits the float loss is replaced by that of a prepared copy."""
    model, space = depthwise(pin={"stem": "w2a8"})
    logits = NaiveLoop(model, space, [(images(), None)], correction=True).logits()
    expected = float(torch.nn.functional.cross_entropy(logits, labels()))
    for proxy in (CLADO(tier="fisher"), Fisher()):
        assert proxy.score(model, space, [(images(), labels())]).facts["base_loss"] == pytest.approx(expected, rel=1e-9)


def test_pieces_have_images_enough_for_statistics():
    """Single images are joined before they run, and little memory does not cut them into pieces of less than 32."""
    model, space = depthwise()
    n = 70
    singles = [(images(n)[at : at + 1], labels(n)[at : at + 1]) for at in range(n)]
    lab = SensitivityRun(model, space, singles, MeasurementOptions(memory_mb=0))
    assert [len(piece) for piece in lab.pieces()] == [32, 38]
    assert torch.equal(torch.cat([piece.inputs for piece in lab.pieces()]), images(n))
    assert torch.equal(torch.cat([piece.labels for piece in lab.pieces()]), labels(n))
    pieces = list(lab.engine.pieces(Batch(images(100))))
    assert [len(piece) for piece in pieces] == [33, 33, 34]
    other = [*singles[:3], (torch.zeros(1, 3, 9, 9, dtype=torch.float64), labels(1))]
    assert list(map(len, SensitivityRun(model, space, other, MeasurementOptions()).batches)) == [3, 1]
    assert list(map(len, SensitivityRun(model, space, singles, MeasurementOptions(correction=False)).batches)) == [1] * n


def test_kept_measurements_tell_the_correction(tmp_path):
    """Corrected and uncorrected numbers kept in one folder are not taken for one another."""
    model, space = depthwise()
    with keeping_measurements(tmp_path):
        first = [KLDivergence(correction=on).score(model, space, [images()]).loss for on in (True, False)]
        second = [KLDivergence(correction=on).score(model, space, [images()]).loss for on in (True, False)]
    assert first[0] != first[1]
    assert first == second
