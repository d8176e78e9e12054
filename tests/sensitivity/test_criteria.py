"""Single losses, linear terms and curvatures against their formulas, worked out in numpy from whole forward passes."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from naive_loops import NaiveLoop, with_statistics
from torch import nn

from mpq_plugins import Batch, Space, find_layers, menu
from mpq_plugins.errors import DataError, ModelError, PluginError
from mpq_plugins.proxies import CLADO
from mpq_plugins.proxies.measuring import MeasurementOptions, SensitivityRun, first_order_effects

N_IMAGES, N_CLASSES = 6, 5


def small_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 16, N_CLASSES),
    )
    return with_statistics(net.double(), images(32))


def images(n=N_IMAGES):
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels(n=N_IMAGES):
    return torch.arange(n) % N_CLASSES


def space_of(model, choices=None, *, example=None, **options):
    inventory = find_layers(model, images(1) if example is None else example)
    return Space.build(inventory, choices or menu((2, 3), (8,)), **options)


def logit_changes(model, space, inputs):
    """Float logits [image, class] and their changes [option, image, class], by whole passes."""
    naive = NaiveLoop(model, space, [(inputs, None)])
    base = naive.logits()
    return base.numpy(), np.stack([(naive.logits(option) - base).numpy() for option in naive.options])


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def gram(p, r):
    """E[r_i' (diag p - p p') r_j] over images, p [image, class] and r [option, image, class]."""
    centred = r - (p * r).sum(-1, keepdims=True)
    return np.einsum("nc,inc,jnc->ij", p, centred, centred) / len(p)


def test_gram_is_its_formula():
    """The linear term is E[(p - y).r], the matrix E[r_i'(diag p - pp')r_j], positive semidefinite, for two batches too."""
    model = small_net()
    space = space_of(model)
    base, r = logit_changes(model, space, images())
    p = softmax(base)
    expected = np.einsum("nc,inc->i", p - np.eye(N_CLASSES)[labels()], r) / N_IMAGES
    batches = [(images()[:4], labels()[:4]), (images()[4:], labels()[4:])]
    scores = CLADO(tier="gram", correction=False, expansion=True).score(model, space, batches)
    np.testing.assert_allclose(np.concatenate(scores.loss), expected, rtol=1e-9)
    np.testing.assert_allclose(scores.pairwise, gram(p, r), rtol=1e-5, atol=1e-6 * gram(p, r).max())
    assert np.linalg.eigvalsh(scores.pairwise).min() > -1e-12 * np.trace(scores.pairwise)


def test_gram_without_labels_has_no_linear_term():
    """Around the float model itself, KL divergence has a slope of zero and the same curvature."""
    model = small_net()
    space = space_of(model)
    base, r = logit_changes(model, space, images())
    scores = CLADO(tier="gram", correction=False, expansion=True).score(model, space, [images()])
    assert not np.any(np.concatenate(scores.loss))
    np.testing.assert_allclose(scores.pairwise, gram(softmax(base), r), rtol=1e-5, atol=1e-6 * gram(softmax(base), r).max())


def test_gram_counts_measured_losses_and_a_share_of_the_interactions():
    """A plan's objective is the sum of its measured single losses and 0.3 of its cross terms, none within a unit."""
    model = small_net()
    space = space_of(model)
    base, r = logit_changes(model, space, images())
    p, target = softmax(base), torch.from_numpy(base)
    singles = [
        float(F.kl_div((target + torch.from_numpy(c)).log_softmax(1), target.softmax(1), reduction="batchmean")) for c in r
    ]
    scores = CLADO(correction=False, shrinkage=0.3).score(model, space, [images()])
    starts = np.cumsum([0, *map(len, scores.loss)])[:-1]
    for choice in itertools.product(*map(range, map(len, scores.loss))):
        rows = [start + index for start, index in zip(starts, choice, strict=True)]
        expected = sum(singles[row] for row in rows) + 0.3 * sum(gram(p, r)[i, j] for i, j in itertools.combinations(rows, 2))
        linear = np.concatenate(scores.loss)
        found = linear[rows].sum() + scores.pairwise[np.ix_(rows, rows)].sum() / 2
        assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tier", ["gram", "fisher"])
def test_the_share_is_what_is_no_noise(tier):
    """It is one less the variance of the mean of the interactions over their squares, each in units of its two choices."""
    model = small_net()
    space = space_of(model)
    expanded = CLADO(tier=tier, correction=False, expansion=True)
    alike = images()[:1] + 0.3 * images()  # or nothing but noise is found
    of_image = [expanded.score(model, space, [(alike[n : n + 1], labels()[n : n + 1])]).pairwise for n in range(N_IMAGES)]
    mean, noise = np.mean(of_image, axis=0), np.var(of_image, axis=0, ddof=1) / N_IMAGES
    unit = np.repeat(np.arange(len(space.units)), [len(members.choices) for members in space.units])
    signal = chance = 0.0
    for i, j in itertools.product(range(len(unit)), repeat=2):
        if unit[i] != unit[j]:
            signal += mean[i, j] ** 2 / (mean[i, i] * mean[j, j])
            chance += noise[i, j] / (mean[i, i] * mean[j, j])
    found = CLADO(tier=tier, correction=False).score(model, space, [(alike, labels())])
    assert 0.0 < found.facts["shrinkage"] == pytest.approx(max(0.0, 1 - chance / signal), rel=1e-4)
    np.testing.assert_allclose(found.pairwise, found.facts["shrinkage"] * mean, rtol=1e-4, atol=1e-6 * mean.max())


def test_a_single_image_says_nothing_of_interactions():
    """Without a variance there is no estimate, so none of them count."""
    model = small_net()
    scores = CLADO(correction=False).score(model, space_of(model), [images()[:1]])
    assert scores.facts["shrinkage"] == 0.0
    assert not np.any(scores.pairwise)


def test_gram_without_interactions_is_the_measured_loss():
    """The ablation keeps the losses of single changes and drops the matrix."""
    model = small_net()
    space = space_of(model)
    base, r = logit_changes(model, space, images())
    target = torch.from_numpy(base)
    losses = [F.cross_entropy(target + torch.from_numpy(change), labels()) - F.cross_entropy(target, labels()) for change in r]
    scores = CLADO(tier="gram", correction=False, cross=False).score(model, space, [(images(), labels())])
    np.testing.assert_allclose(np.concatenate(scores.loss), losses, rtol=1e-9)
    assert scores.pairwise is None


def test_sampled_labels_converge_to_the_gram():
    """Drawing 100 times as many labels brings the sampled matrix ten times closer to the exact one."""
    model = small_net()
    space = space_of(model)
    base, r = logit_changes(model, space, images())
    exact = gram(softmax(base), r)

    def distance(n_samples):
        found = (
            CLADO(tier="gram", correction=False, expansion=True, n_samples=n_samples)
            .score(model, space, [(images(), labels())])
            .pairwise
        )
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    assert distance(20_000) < 0.02 < 0.05 < distance(20) < 2


def derivatives(model, space, losses_of):
    """<gradient of image n's loss, change of a unit's weights> [image, option], one image and one weight at a time."""
    naive = NaiveLoop(model, space, [(images(), None)])
    v = np.zeros((N_IMAGES, len(naive.options)))
    for n in range(N_IMAGES):
        model.zero_grad()
        losses_of(model(images()[n : n + 1]), n).backward()
        for column, (unit, choice) in enumerate(naive.options):
            for layer in space.units[unit].layers:
                weight = model.get_submodule(layer).weight
                delta = naive.weight(layer, space.units[unit].choices[choice].weight) - weight.detach()
                v[n, column] += (weight.grad * delta).sum()
    model.zero_grad()
    return v


def test_fisher_is_the_gradient_of_every_image_times_the_change():
    """Mean and second moment of per-image directional derivatives, with tied units, by one backward pass per image."""
    model = small_net()
    space = space_of(model, tie=[("0", "3")])
    v = derivatives(model, space, lambda logits, n: F.cross_entropy(logits, labels()[n : n + 1]))
    scores = CLADO(tier="fisher", correction=False, expansion=True).score(model, space, [(images(), labels())])
    np.testing.assert_allclose(np.concatenate(scores.loss), v.mean(0), rtol=1e-8)
    np.testing.assert_allclose(scores.pairwise, v.T @ v / N_IMAGES, rtol=1e-8, atol=1e-14)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_fisher_without_labels_is_an_average_over_the_models_own():
    """With many copies of the images, drawn labels give E_{y~p}[v v'], and no linear term."""
    model = small_net()
    space = space_of(model)
    p = softmax(model(images()).detach().numpy())
    expected = 0
    for label in range(N_CLASSES):
        v = derivatives(model, space, lambda logits, n, y=label: F.cross_entropy(logits, torch.tensor([y])))
        expected = expected + np.einsum("n,ni,nj->ij", p[:, label], v, v) / N_IMAGES
    scores = CLADO(tier="fisher", correction=False, expansion=True, n_images=6000).score(
        model, space, [images().repeat(1000, 1, 1, 1)]
    )
    assert not np.any(np.concatenate(scores.loss))
    assert np.linalg.norm(scores.pairwise - expected) < 0.05 * np.linalg.norm(expected)


def test_fisher_with_activations_takes_the_change_at_each_layers_output():
    """Joint choices: the loss gradient at a layer's output times the change of it under quantized weight and input."""
    model = small_net()
    space = space_of(model, menu((2, 8), (4, 8)))
    naive = NaiveLoop(model, space, [(images(), labels())])
    v = np.zeros((N_IMAGES, len(naive.options)))
    seen = {}
    handles = [
        model.get_submodule(layer.name).register_forward_hook(
            lambda _, args, output, name=layer.name: seen.update({name: (args[0].detach(), output)})
        )
        for layer in space.layers
    ]
    for n in range(N_IMAGES):
        loss = F.cross_entropy(model(images()[n : n + 1]), labels()[n : n + 1])
        held = dict(seen)
        gradients = torch.autograd.grad(loss, [held[layer.name][1] for layer in space.layers])
        slope = {layer.name: gradient for layer, gradient in zip(space.layers, gradients, strict=True)}
        for column, (unit, choice) in enumerate(naive.options):
            [name] = space.units[unit].layers
            precision = space.units[unit].choices[choice]
            layer = model.get_submodule(name)
            own = layer.weight.data
            layer.weight.data = naive.weight(name, precision.weight)
            with torch.no_grad():
                moved = layer(naive.activation(name, precision.activation)(held[name][0]))
            layer.weight.data = own
            v[n, column] = (slope[name] * (moved - held[name][1].detach())).sum()
    for handle in handles:
        handle.remove()
    scores = CLADO(tier="fisher", correction=False, expansion=True).score(model, space, [(images(), labels())])
    np.testing.assert_allclose(np.concatenate(scores.loss), v.mean(0), rtol=1e-7, atol=1e-13)
    np.testing.assert_allclose(scores.pairwise, v.T @ v / N_IMAGES, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("activations", [(8,), (4, 8)])
def test_pinned_layers_are_quantized_when_others_are_measured(activations):
    """Base loss and scores are those of a model with the pinned layer's weight, and what it reads, quantized by hand."""
    model = small_net()
    free = {"0": menu((2, 3), activations), "6": menu((2, 3), activations)}
    pinned = Space.build(find_layers(model, images(1)), {**free, "3": menu((2,), activations[:1])})
    by_hand = NaiveLoop(model, pinned, [(images(), labels())])
    quantized = small_net()
    quantized[3].weight.data = by_hand.weight("3", 2)
    if len(activations) > 1:
        quantizer = by_hand.activation("3", activations[0])
        # Gradients pass as if nothing were rounded.
        quantized[3].register_forward_pre_hook(lambda _, args: (args[0] + (quantizer(args[0]) - args[0]).detach(),))
    alone = Space.build(find_layers(quantized, images(1), include=["0", "6"]), free)
    for tier in ("fisher", "gram", "exact"):
        expected = CLADO(tier=tier, correction=False, expansion=True).score(quantized, alone, [(images(), labels())])
        found = CLADO(tier=tier, correction=False, expansion=True).score(model, pinned, [(images(), labels())])
        kept = [index for index, (unit, _) in enumerate(by_hand.options) if unit != 1]
        assert found.facts["base_loss"] == pytest.approx(expected.facts["base_loss"], rel=1e-9)
        if len(activations) == 1:  # else ranges were found behind the quantized layer
            np.testing.assert_allclose(found.loss[0] + found.loss[2], np.concatenate(expected.loss), rtol=1e-7, atol=1e-12)
            np.testing.assert_allclose(found.pairwise[np.ix_(kept, kept)], expected.pairwise, rtol=1e-4, atol=1e-7)


class Overwriting(nn.Module):
    """Changes what a layer has read, in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, N_CLASSES, 3)

    def forward(self, x):
        x = x.relu()
        y = self.a(x)
        x += y
        return self.b(x).mean((2, 3))


def test_activations_written_over_are_refused_by_the_backward_pass():
    """What a layer has read is needed after the pass; the scores that run forward only measure the model."""
    torch.manual_seed(0)
    model = Overwriting().double()
    with pytest.raises(ModelError, match="the activation that a has read in place"):
        CLADO(tier="fisher").score(model, space_of(model), [(images(), labels())])
    naive = NaiveLoop(model, space_of(model), [(images(), labels())])
    losses = [F.cross_entropy(naive.logits(option), labels()).item() for option in naive.options]
    effects = SensitivityRun(model, space_of(model), [(images(), labels())], MeasurementOptions(correction=False)).effects()
    np.testing.assert_allclose(effects.losses + effects.base_loss, losses, rtol=1e-9)


class Sequences(nn.Module):
    """Logits [image, position, class] of whole numbers [image, position]."""

    def __init__(self):
        super().__init__()
        self.embedding, self.a, self.b = nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, N_CLASSES)

    def forward(self, tokens):
        return self.b(torch.relu(self.a(self.embedding(tokens))).cumsum(1))


def sequences():
    """A model, its tokens, labels with left-out positions, and one position of its outputs per image."""
    torch.manual_seed(0)
    tokens, wanted = torch.randint(7, (4, 3)), torch.randint(N_CLASSES, (4, 3))
    wanted[0, 1:] = -100
    wanted[2] = -100
    return Sequences().double(), tokens, wanted


def segmentation():
    """A model with logits [image, class, row, column], and labels per pixel with some left out."""
    torch.manual_seed(0)
    wanted = torch.randint(N_CLASSES, (4, 6, 6))
    wanted[1, :3] = -100
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, N_CLASSES, 1)).double()
    return model, images(4), wanted


@pytest.mark.parametrize("case", [sequences, segmentation])
def test_outputs_with_positions_average_over_those_that_count(case):
    """Losses, slopes and curvature are the mean over images of means over labelled positions; -100 leaves one out."""
    model, inputs, wanted = case()
    space = space_of(model, example=inputs[:1])
    naive = NaiveLoop(model, space, [(inputs, wanted)])
    to_rows = (lambda t: t) if case is sequences else (lambda t: t.flatten(2).transpose(1, 2))
    base, rows = to_rows(naive.logits()), wanted.flatten(1)
    expected, linear, matrix = [], [], np.zeros((len(naive.options), len(naive.options)))
    changes = [to_rows(naive.logits(option)) - base for option in naive.options]
    for change in changes:
        total, slope = 0.0, 0.0
        for n in range(len(inputs)):
            counted = rows[n] != -100
            if counted.any():
                total += F.cross_entropy((base + change)[n][counted], rows[n][counted])
                total -= F.cross_entropy(base[n][counted], rows[n][counted])
                gradient = base[n][counted].softmax(-1) - F.one_hot(rows[n][counted], N_CLASSES)
                slope += (gradient * change[n][counted]).sum(-1).mean()
        expected.append(total / len(inputs))
        linear.append(slope / len(inputs))
    for n in range(len(inputs)):
        counted = rows[n] != -100
        if counted.any():
            r = np.stack([change[n][counted].numpy() for change in changes])
            matrix += gram(softmax(base[n][counted].numpy()), r) / len(inputs)
    effects = SensitivityRun(model, space, [(inputs, wanted)], MeasurementOptions(correction=False)).effects()
    np.testing.assert_allclose(effects.losses, expected, rtol=1e-9)
    np.testing.assert_allclose(effects.slopes, linear, rtol=1e-9)
    np.testing.assert_allclose(effects.curvature, matrix, rtol=1e-4, atol=1e-5 * matrix.max())


def test_squared_error_is_exactly_its_curvature():
    """The mean squared change of the output has no slope, and half of its curvature is the loss."""
    model = small_net()
    space = space_of(model)
    _, r = logit_changes(model, space, images())
    effects = SensitivityRun(model, space, [images()], MeasurementOptions(correction=False, loss="squared_error")).effects(
        pairs=True
    )
    np.testing.assert_allclose(effects.losses, (r**2).mean((1, 2)), rtol=1e-9)
    assert not effects.slopes.any()
    expected = 2 * np.einsum("inc,jnc->ij", r, r) / r[0].size
    np.testing.assert_allclose(effects.curvature, expected, rtol=1e-4, atol=1e-6 * expected.max())


def vector_loss(output, batch):
    return F.cross_entropy(output, batch.labels, reduction="none")


def mean_loss(output, batch):
    return F.cross_entropy(output, batch.labels)


@pytest.mark.parametrize("loss", [vector_loss, mean_loss])
def test_a_loss_of_the_users_own(loss):
    """A cross-entropy given as a function has the losses and slopes of the built-in one, in all three measurements."""
    model = small_net()
    space = space_of(model)
    batches = [(images(), labels())]
    own, built_in = (
        SensitivityRun(model, space, batches, MeasurementOptions(correction=False, loss=loss))
        for loss in (loss, "cross_entropy")
    )
    one, other = own.effects(pairs=True), built_in.effects(pairs=True)
    for name in ("base_loss", "losses", "slopes", "pairs"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-6, atol=1e-12)
    fisher, expected = first_order_effects(own), first_order_effects(built_in)
    np.testing.assert_allclose(fisher.slopes, expected.slopes, rtol=1e-9)
    if loss is vector_loss:
        np.testing.assert_allclose(fisher.curvature, expected.curvature, rtol=1e-9)


@pytest.mark.parametrize("tier", ["fisher", "gram", "exact"])
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, batch: output, "one number per image"),
        (lambda output, batch: 1.0, "one number per image"),
        (lambda output, batch: torch.zeros(len(batch)), "does not depend on the model's output"),
    ],
    ids=["matrix", "number", "constant"],
)
def test_a_loss_of_the_wrong_form_is_refused(tier, loss, words):
    """The error says what came and what is wanted."""
    model = small_net()
    with pytest.raises(DataError, match=words):
        CLADO(tier=tier, loss=loss).score(model, space_of(model), [(images(), labels())])


def test_an_unknown_loss_is_named():
    """The error lists the losses there are."""
    model = small_net()
    with pytest.raises(PluginError, match="cross_entropy, kl, squared_error"):
        CLADO(loss="hinge").score(model, space_of(model), [Batch(images(), labels())])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tier": "hessian"}, "no tier 'hessian'"),
        ({"shrinkage": -3.0}, "share from 0 to 1"),
        ({"shrinkage": float("nan")}, "share from 0 to 1"),
        ({"shrinkage": 0.5, "expansion": True}, "no meaning with expansion"),
        ({"shrinkage": 0.5, "tier": "exact"}, "no meaning with tier exact"),
    ],
)
def test_options_that_mean_nothing(options, match):
    """Told when the score is made, not as strange losses."""
    with pytest.raises(PluginError, match=match):
        CLADO(**options)
