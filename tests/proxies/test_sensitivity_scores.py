"""Scores that quantize one unit at a time, against formulas worked out without the engine."""

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpq_plugins import Scores, Space, find_layers, menu
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.errors import DataError, ModelError, PluginError
from mpq_plugins.proxies import Fisher, HessianTrace, KLDivergence, LossIncrease, OutputError, RankEnsemble, WeightError
from mpq_plugins.proxies.base import AbstractProxy
from mpq_plugins.proxies.measuring import keeping_measurements
from mpq_plugins.proxies.measuring.cache import MeasurementCache
from mpq_plugins.proxies.rank_ensemble import ranks
from mpq_plugins.quantizers.uniform import mse_scale, quantize

MEASURED = [
    LossIncrease(),
    KLDivergence(),
    OutputError(),
    OutputError(measure="sqnr"),
    HessianTrace(n_probes=8),
    Fisher(),
    Fisher(of="weights"),
    RankEnsemble(),
]
every_measured = pytest.mark.parametrize("proxy", MEASURED, ids=repr)


class Net(nn.Module):
    """In-place activations, batch normalisation, a layer called twice, a depthwise and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.smooth = nn.SiLU(inplace=True)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        x = self.smooth(self.twice(self.twice(x)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    model = Net()
    nn.init.uniform_(model.norm.running_mean, -0.3, 0.3)
    nn.init.uniform_(model.norm.running_var, 0.5, 1.5)
    return model.eval()


def images(n=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, 5, 5, generator=generator), torch.arange(n) % 4


def space_of(model, activations=(8,), shape=(1, 2, 5, 5), **options):
    return Space.build(find_layers(model, torch.zeros(shape)), menu((2, 4), activations), **options)


def quantized(weight, bits):
    scale = mse_scale(weight, bits)
    return quantize(weight, scale, bits) * scale


def naive_outputs(model, space, x):
    """The float output, and for every unit and choice the output of a copy of the model with quantized weights."""
    with torch.no_grad():
        rows = []
        for unit in space.units:
            rows.append([])
            for choice in unit.choices:
                other = copy.deepcopy(model)
                for name in unit.layers:
                    weight = other.get_submodule(name).weight
                    weight.copy_(quantized(weight, choice.weight))
                rows[-1].append(other(x).double().numpy())
        return model(x).double().numpy(), rows


def log_softmax(logits):
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def test_output_scores_equal_numpy_on_copies_of_the_model(net):
    """Mean squared error, SQNR, KL divergence and loss increase are those of plain forward passes of quantized copies."""
    x, labels = images()
    space = space_of(net)
    base, rows = naive_outputs(net, space, x)
    p = np.exp(log_softmax(base))

    def cross_entropy(logits):
        return -log_softmax(logits)[np.arange(len(labels)), labels.numpy()].mean()

    expected = {
        OutputError(correction=False): lambda q: ((q - base) ** 2).mean(),
        OutputError(measure="sqnr", correction=False): lambda q: -10 * np.log10((base**2).mean() / ((q - base) ** 2).mean()),
        KLDivergence(correction=False): lambda q: (p * (log_softmax(base) - log_softmax(q))).sum(1).mean(),
        LossIncrease(correction=False): lambda q: cross_entropy(q) - cross_entropy(base),
    }
    batches = [(x[:4], labels[:4]), (x[4:], labels[4:])]
    for proxy, formula in expected.items():
        wanted = [[formula(output) for output in row] for row in rows]
        np.testing.assert_allclose(proxy.score(net, space, batches).loss, wanted, rtol=2e-4, atol=1e-7, err_msg=repr(proxy))


def whole_hessians(model, loss):
    """The Hessian of every weight [length, length]."""
    hessians = {}
    for name in ("first.weight", "twice.weight", "head.weight"):
        weight = model.get_parameter(name).detach()
        with torch.enable_grad():
            hessian = torch.autograd.functional.hessian(
                lambda value, name=name: loss(lambda x: torch.func.functional_call(model, {name: value}, (x,))), weight
            )
        hessians[name] = hessian.reshape(weight.numel(), -1).double()
    return hessians


@pytest.mark.parametrize(("labelled", "together"), [(True, False), (False, False), (True, True)])
def test_hutchinson_traces_equal_those_of_whole_hessians(net, labelled, together):
    """Estimates and their errors fit tr(H) / n and the variance 2 (|H|^2 - |diag H|^2) of v'Hv; no labels: predicted ones."""
    x, labels = images()
    p = net(x).softmax(1).detach()
    hessians = whole_hessians(net, lambda run: F.cross_entropy(run(x), labels if labelled else p))
    one = [(x, labels)] if labelled else [x]
    two = [(x[:4], labels[:4]), (x[4:], labels[4:])] if labelled else [x[:4], x[4:]]
    for batches in (one, two):
        facts = HessianTrace(n_probes=100, tolerance=0, together=together).score(net, space_of(net), batches).facts
        for name, hessian in hessians.items():
            diagonal = hessian.diagonal()
            variance = 2 * (hessian.square().sum() - diagonal.square().sum())
            expected_error = float(variance / 100) ** 0.5 / len(hessian)
            assert abs(facts["mean_trace"][name] - float(diagonal.mean())) <= 4 * facts["standard_error"][name]
            if batches is one and not together:  # together, the products of different weights add to the error
                assert facts["standard_error"][name] == pytest.approx(expected_error, rel=0.35)


def test_the_hessian_score_is_mean_trace_times_squared_error(net):
    """Losses are HAWQ-V2's product, with a trace below zero counting as zero."""
    space = space_of(net)
    scores = HessianTrace(n_probes=8).score(net, space, [images()])
    for unit, losses in zip(space.units, scores.loss, strict=True):
        weight = net.get_submodule(unit.name).weight.detach()
        trace = max(0.0, scores.facts["mean_trace"][f"{unit.name}.weight"])
        wanted = [trace * float((quantized(weight, choice.weight) - weight).square().sum()) for choice in unit.choices]
        np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def test_one_probe_is_exact_for_a_diagonal_hessian():
    """Images e1, 2 e2, 3 e3 give H = 2/3 diag(1, 4, 9) for the squared error, so v'Hv / 3 is 28/9 whatever the signs."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    scores = HessianTrace(n_probes=1, loss="squared_error").score(
        model, space_of(model, shape=(1, 3)), [torch.diag(torch.tensor([1.0, 2.0, 3.0]))]
    )
    assert scores.facts["mean_trace"]["0.weight"] == pytest.approx(28 / 9, rel=1e-6)
    assert scores.facts["n_probes"] == {"0.weight": 1}


def test_probes_stop_when_traces_are_known(net):
    """A loose tolerance needs one round of probes, a tolerance of zero takes all that are allowed."""
    space = space_of(net)
    loose, strict = (HessianTrace(n_probes=20, tolerance=t).score(net, space, [images()]) for t in (1000, 0))
    assert set(loose.facts["n_probes"].values()) == {8}
    assert set(strict.facts["n_probes"].values()) == {20}


def test_frozen_weights_have_the_same_traces(net):
    """Parameters that take no gradient are scored as if they did, and stay frozen."""
    space = space_of(net)
    wanted = HessianTrace(n_probes=8).score(net, space, [images()])
    frozen = copy.deepcopy(net).requires_grad_(False)
    assert HessianTrace(n_probes=8).score(frozen, space, [images()]).loss == wanted.loss
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert Fisher(of="weights").score(frozen, space, [images()]).loss == Fisher(of="weights").score(net, space, [images()]).loss


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.scaled_dot_product_attention(self.query(x), x, self.value(x)).mean(1))


def test_traces_of_attention_and_computed_weights():
    """Fused attention and weights that are computed before each call have second derivatives too."""
    torch.manual_seed(0)
    model = Attention().eval()
    x = torch.randn(5, 6, 4)
    scores = HessianTrace(n_probes=8).score(model, space_of(model, shape=(1, 6, 4)), [(x, torch.arange(5) % 3)])
    assert all(trace != 0 for trace in scores.facts["mean_trace"].values())
    assert len(scores.facts["mean_trace"]) == 3


def per_image_losses(model, x, labels):
    return [F.cross_entropy(model(x[n : n + 1]), labels[n : n + 1]) for n in range(len(x))]


def test_fisher_of_weights_equals_a_loop_over_images(net):
    """Half the mean over images of g^2 d^2, with g from one backward pass per image."""
    x, labels = images()
    space = space_of(net)
    wanted = []
    for unit in space.units:
        weight = net.get_submodule(unit.name).weight
        gradients = [torch.autograd.grad(loss, weight)[0] for loss in per_image_losses(net, x, labels)]
        fisher = torch.stack(gradients).square().mean(0)
        errors = [(quantized(weight.detach(), choice.weight) - weight.detach()).square() for choice in unit.choices]
        wanted.append([float(0.5 * (fisher * error).sum()) for error in errors])
    scores = Fisher(of="weights").score(net, space, [(x[:4], labels[:4]), (x[4:], labels[4:])])
    np.testing.assert_allclose(scores.loss, wanted, rtol=1e-4)


def test_fisher_of_outputs_equals_a_loop_over_images(net):
    """Half the mean over images of the squared product of output gradient and output change, over all calls of a layer."""
    x, labels = images()
    space = space_of(net)
    wanted = []
    for unit in space.units:
        module = net.get_submodule(unit.name)
        calls: list[Any] = []

        def keep(_module, inputs, output, calls=calls):
            output.retain_grad()
            calls.append((inputs[0].detach().clone(), output))
            return output.clone()  # what follows may work in place

        handle = module.register_forward_hook(keep)
        row = np.zeros(len(unit.choices))
        for n in range(len(x)):
            calls.clear()
            F.cross_entropy(net(x[n : n + 1]), labels[n : n + 1]).backward()
            for value, output in calls:
                for index, choice in enumerate(unit.choices):
                    other = copy.deepcopy(module)
                    other._forward_hooks.clear()
                    with torch.no_grad():
                        other.weight.copy_(quantized(module.weight, choice.weight))
                        row[index] += float(0.5 * ((other(value) - output) * output.grad).square().sum()) / len(x)
        handle.remove()
        wanted.append(row.tolist())
    scores = Fisher(correction=False).score(net, space, [(x[:4], labels[:4]), (x[4:], labels[4:])])
    np.testing.assert_allclose(scores.loss, wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", [Fisher, HessianTrace])
def test_a_loss_of_ones_own_is_differentiated(net, kind):
    """A function that computes cross-entropy gives what cross-entropy by name gives."""
    space = space_of(net)
    named = kind(loss="cross_entropy").score(net, space, [images()])
    own = kind(loss=lambda output, batch: F.cross_entropy(output, batch.labels, reduction="none"))
    np.testing.assert_allclose(own.score(net, space, [images()]).loss, named.loss, rtol=1e-4)


def test_weight_error_by_hand():
    """Row (1, 1, 1, 0.4) at 2 bits takes step 1 and loses 0.4^2; twice the row loses four times as much."""
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1, 1, 1, 0.4], [2, 2, 2, 0.8]]))
    space = Space.build(find_layers(model, torch.zeros(1, 4)), menu((2, 8), (8,)))
    assert WeightError().score(model, space).loss[0][0] == pytest.approx(0.16 + 0.64, rel=1e-5)
    relative = WeightError(normalised=True).score(model, space).loss[0][0]
    assert relative == pytest.approx((0.16 + 0.64) / (3.16 + 4 * 3.16), rel=1e-5)


def test_a_shared_weight_counts_once():
    """Two layers that hold one weight lose what one of them loses."""
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    two.weight = one.weight
    model = nn.Sequential(one, nn.ReLU(), two)
    alone = WeightError().score(nn.Sequential(one), space_of(nn.Sequential(one), shape=(1, 4)))
    assert WeightError().score(model, space_of(model, shape=(1, 4))).loss == alone.loss


@pytest.mark.parametrize("proxy", [LossIncrease(), KLDivergence(), OutputError(), Fisher()], ids=repr)
def test_activation_bits_are_told_apart(net, proxy):
    """Where activation bits are searched, choices that differ in them alone have different losses."""
    scores = proxy.score(net, space_of(net, (3, 8)), [images()])
    assert all(len(set(losses)) == len(losses) for losses in scores.loss)


@pytest.mark.parametrize("proxy", [WeightError(), HessianTrace(n_probes=8), Fisher(of="weights")], ids=repr)
def test_scores_of_weights_prefer_the_wider_activation_by_a_hair(net, proxy):
    """Choices of equal weight bits differ by less than a hundredth of a per mille, the wider activation ahead."""
    space = space_of(net, (4, 8))
    for unit, losses in zip(space.units, proxy.score(net, space, [images()]).loss, strict=True):
        loss = dict(zip(map(str, unit.choices), losses, strict=True))
        assert loss["w2a4"] == pytest.approx(loss["w2a8"], rel=1e-5)
        assert loss["w2a4"] > loss["w2a8"] or loss["w2a8"] == 0


@every_measured
def test_pinned_units_lose_nothing(net, proxy):
    """A unit without a decision gets zeros."""
    space = space_of(net, pin={"twice": "w8a8"})
    [pinned] = [index for index, unit in enumerate(space.units) if unit.name == "twice"]
    assert proxy.score(net, space, [images()]).loss[pinned] == (0.0,)


def test_equal_values_share_their_ranks():
    """3, 1, 1, 2 have ranks 4, 1.5, 1.5, 3."""
    assert ranks([3.0, 1.0, 1.0, 2.0]).tolist() == [4, 1.5, 1.5, 3]


@dataclass(frozen=True)
class Fixed(AbstractProxy):
    table: tuple[tuple[float, ...], ...]
    recipe_name: str = "fixed"
    pairwise: Any = field(default=None, compare=False)
    needs_data = False

    def score(self, model, space, batches=()):
        return Scores(space, self.table, {"name": self.recipe_name}, {}, self.pairwise)

    @property
    def name(self):
        return self.recipe_name


def test_the_ensemble_by_hand(net, monkeypatch):
    """Ranks over the free units' choices, averaged over the members; the pinned unit takes no rank and gets zero."""
    members = {
        "a": Fixed(((9.0, 1.0), (5.0,), (7.0, 3.0)), "a"),  # ranks 4 1 | 3 2
        "b": Fixed(((0.2, 0.2), (9.0,), (0.3, -1.0)), "b"),  # ranks 2.5 2.5 | 4 1
    }
    monkeypatch.setattr("mpq_plugins.common.plugins.make", lambda kind, name, options=None: members[name])
    space = space_of(net, pin={"twice": "w8a8"})
    scores = RankEnsemble(members=("a", "b")).score(net, space)
    assert scores.loss == ((3.25, 1.75), (0.0,), (3.5, 1.5))
    assert scores.facts["members"]["a"] == [9.0, 1.0, 5.0, 7.0, 3.0]


def test_members_get_the_options_that_they_have(net):
    """Images, quantizer and output of the ensemble are those of its members."""
    space = space_of(net)
    options = {"n_images": 3, "per_channel": False, "output": lambda logits: logits[:, :2]}
    scores = RankEnsemble(members="output-error,weight-error", **options).score(net, space, [images()])
    alone = [OutputError(**options).score(net, space, [images()]), WeightError(per_channel=False).score(net, space)]
    assert list(scores.facts["members"].values()) == [np.concatenate(member.loss).tolist() for member in alone]


def test_members_are_a_tuple_or_text():
    """Both ways to name the members make the same proxy."""
    assert RankEnsemble(members=("fisher", "weight-error")) == RankEnsemble(members="fisher,weight-error")


@pytest.mark.parametrize(("members", "message"), [("", "members"), ("fisher,rank-ensemble", "itself"), ("clado", "pairs")])
def test_members_without_ranks_are_refused(net, members, message):
    """No members, itself, and scores of pairs are named in the error."""
    with pytest.raises(PluginError, match=message):
        RankEnsemble(members=members).score(net, space_of(net), [images()])


def test_an_ensemble_reads_its_data_once(net):
    """All members see the same images, even of a loader that can be read only once."""
    scores = RankEnsemble(members="kl-divergence,output-error").score(net, space_of(net), iter([images()]))
    alone = KLDivergence().score(net, space_of(net), [images()])
    assert scores.facts["members"]["kl-divergence"] == np.concatenate(alone.loss).tolist()


@every_measured
def test_one_image_is_enough(net, proxy):
    """A sensitivity set of one image gives finite scores."""
    assert np.isfinite(np.concatenate(proxy.score(net, space_of(net), [images(1)]).loss)).all()


@every_measured
def test_no_data_is_an_error(net, proxy):
    """Scores that need images say so."""
    with pytest.raises(DataError, match="no batches"):
        proxy.score(net, space_of(net))


@pytest.mark.parametrize("proxy", [*MEASURED, WeightError()], ids=repr)
def test_weights_that_are_not_finite_are_named(net, proxy):
    """NaN in a weight is an error that names the layer."""
    space = space_of(net)
    with torch.no_grad():
        net.twice.weight[0] = torch.nan
    with pytest.raises((ModelError, DataError), match="finite"):
        proxy.score(net, space, [images()])


@pytest.mark.parametrize("kind", [LossIncrease, Fisher, HessianTrace])
def test_cross_entropy_needs_labels(net, kind):
    """Asking for cross-entropy without labels is an error, and the proxy says beforehand that it needs them."""
    proxy = kind(loss="cross_entropy")
    assert proxy.needs_labels
    assert not kind().needs_labels
    with pytest.raises(DataError, match="needs labels"):
        proxy.score(net, space_of(net), [images()[0]])


def test_a_zero_output_has_no_signal_to_noise_ratio(net):
    """SQNR of an output of zeros is refused."""
    nn.init.zeros_(net.head.weight)
    nn.init.zeros_(net.head.bias)
    with pytest.raises(DataError, match="zero on all images"):
        OutputError(measure="sqnr").score(net, space_of(net), [images()])


def test_no_probes_are_refused(net):
    """A trace needs a probe."""
    with pytest.raises(PluginError, match="n_probes is 0"):
        HessianTrace(n_probes=0).score(net, space_of(net), [images()])


@every_measured
def test_what_was_measured_is_taken_up(net, proxy, tmp_path, monkeypatch):
    """With measurements kept on disk, scoring again measures nothing and gives the same losses."""
    space, writes = space_of(net), []
    put = MeasurementCache.put
    monkeypatch.setattr(MeasurementCache, "put", lambda journal, key, arrays: (writes.append(key), put(journal, key, arrays)))
    with keeping_measurements(tmp_path):
        first = proxy.score(net, space, [images()])
        assert writes
        writes.clear()
        assert proxy.score(net, space, [images()]).loss == first.loss
    assert not writes


@pytest.fixture(scope="module")
def trained():
    net = trained_digits_net(epochs=2)
    space = Space.build(find_layers(net, torch.zeros(1, 1, 8, 8)), menu((2, 8), (8,)))
    return net, space, digits(train=True)


@pytest.mark.parametrize(
    "proxy",
    [KLDivergence(), OutputError(), OutputError(measure="sqnr"), HessianTrace(n_probes=8), Fisher(), WeightError()],
    ids=repr,
)
def test_two_bits_harm_a_trained_network_more_than_eight(trained, proxy):
    """On trained digits every unit loses more at 2 bits than at 8."""
    net, space, batches = trained
    scores = (replace(proxy, n_images=64) if hasattr(proxy, "n_images") else proxy).score(net, space, batches)
    assert all(low > high for low, high in scores.loss)
