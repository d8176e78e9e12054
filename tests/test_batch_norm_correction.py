"""Batch-norm correction by difference, bias correction, and repairs that are kept only where they help."""

import copy
import math

import pytest
import torch
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.adapter.ptq import PTQ
from mpq_plugins.adapter.repairs import Images, Judge, hold_out, keep_what_helps, repair, repairs_of, to_correct_with
from mpq_plugins.common.plugins import make
from mpq_plugins.digits import digits, trained_digits_net
from mpq_plugins.model.run import Batch
from mpq_plugins.quantizers.batch_norm import (
    AbstractSite,
    bias_sites,
    correct_by_difference,
    corrected_around,
    norm_sites,
)


def correct_norms(reference, module, batches):
    """Correct all normalisations of a module."""
    return correct_by_difference(reference, module, batches, norm_sites(module))


def randomized(net):
    """The net with statistics that no images would give."""
    torch.manual_seed(1)
    for module in net.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


class Chain(nn.Module):
    """Two convolutions of one channel and one weight, each with its normalisation."""

    def __init__(self, first, second):
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        self.norm_one, self.norm_two = nn.BatchNorm2d(1, eps=0.0), nn.BatchNorm2d(1, eps=0.0)
        nn.init.constant_(self.one.weight, first)
        nn.init.constant_(self.two.weight, second)
        self.eval()

    def forward(self, x):
        return self.norm_two(self.two(self.norm_one(self.one(x))))


def test_a_change_in_place_is_corrected_as_one_of_two_networks():
    """A module whose weights change inside moves as `correct_by_difference` moves a changed copy; held norms do not."""
    images = [torch.tensor([0.0, 4.0]).reshape(2, 1, 1, 1), torch.tensor([1.0, 7.0]).reshape(2, 1, 1, 1)]
    expected, module, held = (Chain(2.0, 3.0), Chain(1.0, 1.0), Chain(1.0, 1.0))
    correct_norms(Chain(1.0, 1.0), expected, images)
    for net, names in ((module, ()), (held, ("norm_one", "norm_two"))):
        with corrected_around(net, images, lambda net=net, names=names: norm_sites(net, held=names)):
            nn.init.constant_(net.one.weight, 2.0)
            nn.init.constant_(net.two.weight, 3.0)
    for key, buffer in expected.named_buffers():
        torch.testing.assert_close(module.get_buffer(key), buffer)
    assert (held.norm_one.running_mean.item(), held.norm_two.running_var.item()) == (0.0, 1.0)
    before = copy.deepcopy(module.state_dict())
    with corrected_around(module, images, lambda: norm_sites(module)):
        pass
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


def test_a_hand_worked_case():
    """Weights of 1 and 1 become 2 and 3 on the images 0, 4 (mean 2, variance 4).

    First norm: the mean moves by 4 - 2, the variance by 16 / 4, so from (1, 9) to (3, 36). What it returns is then
    (0 - 3) / 6 and (8 - 3) / 6, where the float one returns (0 - 1) / 3 and (4 - 1) / 3: mean 1/6 against 1/3, variance 4/9
    in both. The second layer triples that: mean 1/2, variance 4. Its norm moves from (5, 2) by 1/2 - 1/3 and 4 / (4/9) = 9.
    """
    reference, module = Chain(1.0, 1.0), Chain(2.0, 3.0)
    for net in (reference, module):
        net.norm_one.running_mean.fill_(1.0)
        net.norm_one.running_var.fill_(9.0)
        net.norm_two.running_mean.fill_(5.0)
        net.norm_two.running_var.fill_(2.0)
    assert correct_norms(reference, module, [torch.tensor([0.0, 4.0]).reshape(2, 1, 1, 1)]) == 1
    assert module.norm_one.running_mean.item() == pytest.approx(3.0)
    assert module.norm_one.running_var.item() == pytest.approx(36.0)
    assert module.norm_two.running_mean.item() == pytest.approx(5.0 + 1 / 2 - 1 / 3, rel=1e-5)
    assert module.norm_two.running_var.item() == pytest.approx(18.0, rel=1e-5)


def test_batches_are_averaged_and_ratios_held():
    """Means over batches weighted by images, ratios in the logarithm, at most 10 each."""
    reference, module = Chain(1.0, 1.0), Chain(2.0, 1.0)
    batches = [torch.tensor([0.0, 4.0]).reshape(2, 1, 1, 1), torch.tensor([0.0, 8.0, 0.0, 8.0, 0.0, 8.0]).reshape(6, 1, 1, 1)]
    correct_norms(reference, module, batches)
    assert module.norm_one.running_mean.item() == pytest.approx((2 * 2 + 4 * 6) / 8)
    assert module.norm_one.running_var.item() == pytest.approx(4.0)
    far = Chain(100.0, 1.0)
    correct_norms(reference, far, batches)
    assert far.norm_one.running_var.item() == pytest.approx(10.0)


class Frozen(nn.Module):
    """A normalisation of a class of its own, as torchvision's detectors have."""

    def __init__(self, n_channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(n_channels))
        self.register_buffer("running_var", torch.ones(n_channels))

    def forward(self, x):
        return (x - self.running_mean.view(1, -1, 1, 1)) * torch.rsqrt(self.running_var.view(1, -1, 1, 1) + 1e-5)


NETS = {
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), Frozen(4), nn.Flatten(), nn.Linear(64, 3)
    ),
    "pre-activation": lambda: nn.Sequential(
        nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True)
    ),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
}


def sites_of(net):
    inventory = find_layers(net, torch.randn(2, 3, 8, 8))
    return {
        **norm_sites(net),
        **bias_sites(net, {layer.name: layer.kind for layer in inventory if not layer.n_norm_parameters}),
    }


@pytest.mark.parametrize("name", NETS)
def test_nothing_quantized_changes_nothing(name):
    """With equal networks every parameter and statistic stays what it is, to the bit, whatever the images are."""
    reference = randomized(NETS[name]())
    module = copy.deepcopy(reference)
    assert sites_of(module)
    correct_by_difference(reference, module, [5 * torch.randn(4, 3, 8, 8) + 3 for _ in range(3)], sites_of(module))
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["convolutions", "linear"])
def test_scaled_and_shifted_layers_are_put_right(name):
    """Where the images are like the training data, a layer whose channels are scaled and shifted does no harm any more."""
    images = torch.randn(16, 3, 8, 8)
    reference = randomized(NETS[name]())
    first = next(key for key, child in reference.named_modules() if isinstance(child, (nn.Conv2d, nn.Linear)))
    norm = next(child for child in reference.modules() if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)))
    handle = norm.register_forward_pre_hook(
        lambda module, inputs: (module.running_mean.copy_(inputs[0].transpose(0, 1).flatten(1).mean(1)), None)[1]
    )
    with torch.no_grad():
        reference(images)
        handle.remove()
        module = copy.deepcopy(reference)
        module.get_submodule(first).weight.mul_(1.5)
        module.get_submodule(first).bias.mul_(1.5).add_(0.7)
        assert (module(images) - reference(images)).abs().max() > 0.1
        correct_by_difference(reference, module, [images], sites_of(module))
        # Variances carry an eps that their ratio does not know.
        torch.testing.assert_close(module(images), reference(images), rtol=0, atol=1e-3)


def test_an_interruption_puts_everything_back():
    """A batch that fails leaves module and statistics as they were."""
    reference = randomized(NETS["convolutions"]())
    module = copy.deepcopy(reference)
    with torch.no_grad():
        module[0].weight.mul_(1.5)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(RuntimeError):
        correct_by_difference(reference, module, [torch.randn(4, 3, 8, 8), torch.randn(4, 7, 8, 8)], sites_of(module))
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in module.modules())


@pytest.mark.parametrize(("sizes", "most", "n_held"), [([128], 32, 16), ([32] * 4, 32, 16), ([1] * 40, 32, 5), ([512], 32, 32)])
def test_images_are_held_back_from_all_batches(sizes, most, n_held):
    """An eighth of the images at most, no image twice, none lost."""
    start, batches = 0, []
    for size in sizes:
        batches.append(Batch(torch.arange(start, start + size)))
        start += size
    used, held = hold_out(batches, most)
    assert sum(map(len, held)) == n_held
    assert sorted(torch.cat([batch.inputs for batch in [*used, *held]]).tolist()) == list(range(start))
    assert hold_out([Batch(torch.arange(15))], 32)[1] == []


def test_the_judge_is_the_textbook_divergence():
    """KL of two distributions of two classes, by hand; squared error over power for outputs that are no classes."""
    model, module = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]]))
        module.weight.zero_()
    one = Batch(torch.tensor([[1.0, 0.0]]))
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert Judge(model, [one]).distance(module) == pytest.approx(expected)
    deep = Batch(torch.tensor([[[1.0, 0.0]]]))
    assert Judge(model, [deep]).distance(module) == pytest.approx(1.0)


def test_a_repair_that_hurts_is_not_kept():
    """Re-estimated on images unlike the training data a trained statistic is lost: it is put back, and the figures say so."""
    torch.manual_seed(0)
    reference = randomized(NETS["convolutions"]())
    module = copy.deepcopy(reference)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    odd = [Batch(torch.randn(32, 3, 8, 8) * 4 + 2)]
    [made] = repair(
        module,
        PTQ(batch_norm="re-estimated", bias_correction=False),
        odd,
        Judge(reference, [Batch(torch.randn(8, 3, 8, 8))]),
        reference=reference,
        norms=dict,
        biases=dict,
        reestimate=lambda: module[1].running_mean.fill_(100.0),
    )
    assert (made.option, made.kept, made.before) == ("batch_norm=re-estimated", False, 0.0)
    assert made.after > 0
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.fixture(scope="module")
def trained():
    """A network that has learned something, its layers at 2 bits but the first and the last, and images."""
    net = trained_digits_net(epochs=2)
    images = digits(train=True, batch_size=128)[0].inputs
    layers = find_layers(net, images[:1])
    ends = (layers.layers[0].name, layers.layers[-1].name)
    bits = {layer.name: Precision(8 if layer.name in ends else 2, 8) for layer in layers}
    return net, images, BitConfig(bits, layers.fingerprint)


@pytest.mark.parametrize(("adapter", "options"), [("nncf", {}), ("brevitas", {}), ("brevitas", {"profile": "finn"})])
def test_prepare_judges_its_repairs(trained, adapter, options):
    """Both adapters correct by difference, which brings other images nearer to the float network; the figures are told."""
    net, images, bits = trained
    target = make("adapters", adapter, options)
    module, plain = (
        target.prepare(net, bits, images[:1], [images], batch_norm=choice, bias_correction=False)
        for choice in ("corrected", "kept")
    )
    [made] = repairs_of(module)
    assert (made.option, made.n_images, made.kept) == ("batch_norm=corrected", 16, True)
    judge = Judge(net, [Batch(digits(train=False, batch_size=100)[0].inputs)])
    assert judge.distance(module) < 0.5 * judge.distance(plain)
    assert repairs_of(copy.deepcopy(module)) == repairs_of(module)


def test_layers_of_tokens_keep_their_biases():
    """A mean over tokens would spread the error of a few over all: only a layer with one row per image is corrected."""
    reference = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    module = copy.deepcopy(reference)
    with torch.no_grad():
        module[0].weight.mul_(1.5)
    before = module[0].bias.clone()
    sites = bias_sites(module, {"0": "Linear", "3": "Linear"})
    correct_by_difference(reference, module, [torch.randn(8, 3, 4)], sites)
    assert torch.equal(module[0].bias, before)
    assert not torch.equal(module[3].bias, reference[3].bias)


@pytest.mark.parametrize(("adapter", "options"), [("nncf", {}), ("brevitas", {}), ("brevitas", {"profile": "finn"})])
def test_switching_bits_corrects_what_the_switch_does(trained, adapter, options):
    """From 8 to 2 bits in place moved statistics stay nearer to the float network; equal bits change nothing."""
    net, images, bits = trained
    wide = BitConfig(dict.fromkeys(bits.layers, Precision(8, 8)), bits.fingerprint)
    target = make("adapters", adapter, options)
    start = target.prepare(net, wide, images[:1], [images], held_out=0)
    before = {name: value.clone() for name, value in start.named_buffers()}
    target.set_bits(start, wide, [images])
    assert all(torch.equal(before[name], value) for name, value in start.named_buffers())
    kept, corrected = (
        target.set_bits(copy.deepcopy(start), bits, [images], batch_norm=choice) for choice in ("kept", "corrected")
    )
    judge = Judge(net, [Batch(digits(train=False, batch_size=100)[0].inputs)])
    assert judge.distance(corrected) < judge.distance(kept)


def test_a_correction_that_changes_nothing_is_not_told():
    """Where every layer has a row per token no bias moves, so there is nothing to judge."""
    reference = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    batch = [Batch(torch.randn(8, 3, 4))]
    sites = {"0": "Linear", "2": "Linear"}
    module = copy.deepcopy(reference)
    options = {"reference": reference, "norms": dict, "reestimate": lambda: None}
    judge = Judge(reference, batch)
    assert repair(module, PTQ(), batch, judge, biases=lambda: bias_sites(module, sites), **options) == []


class Nudge(AbstractSite):
    """A correction that is worth a step of a bias, known beforehand."""

    axis = 1

    def __init__(self, bias, step):
        super().__init__()
        self.shift, self.bias, self.step, self.before = object(), bias, step, bias.detach().clone()

    def corrected(self, values, shift):
        return values

    def finish(self):
        self.bias.copy_(self.before + self.step)

    def undo(self):
        self.bias.copy_(self.before)


@pytest.mark.parametrize(
    ("of_norm", "of_bias", "told", "left"),
    [
        (-0.3, -0.2, [("batch_norm=corrected, bias_correction=true", True)], (0.2, 0.3)),
        (5.0, -0.2, [("batch_norm=corrected", False), ("bias_correction=true", True)], (0.5, 0.3)),
        (-0.3, 5.0, [("batch_norm=corrected", True), ("bias_correction=true", False)], (0.2, 0.5)),
    ],
)
def test_corrections_are_judged_together_and_apart_where_that_hurts(of_norm, of_bias, told, left):
    """One judging for two that help; of a good and a bad one the good one stays, and both are told."""
    reference = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for layer in reference:
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    module = copy.deepcopy(reference)
    for layer in module:
        nn.init.constant_(layer.bias, 0.5)
    batch = [Batch(torch.randn(8, 1))]
    options = {"reference": reference, "reestimate": lambda: None}
    found = repair(
        module,
        PTQ(),
        batch,
        Judge(reference, batch),
        norms=lambda: {"norm": Nudge(module[0].bias, of_norm)},
        biases=lambda: {"layer": Nudge(module[1].bias, of_bias)},
        **options,
    )
    assert [(made.option, made.kept) for made in found] == told
    assert [float(layer.bias) for layer in module] == pytest.approx(left)


@pytest.mark.parametrize(("narrowest", "n_batches"), [(8, 3), (7, 5)])
def test_few_images_tell_what_8_bit_weights_move(narrowest, n_batches):
    """Batches of 30 images: the first three hold 64; a single narrower weight asks for all five."""
    bits = BitConfig({"a": Precision(8, 4), "b": Precision(narrowest, 8)}, "fingerprint")
    assert len(to_correct_with([Batch(torch.zeros(30, 1))] * 5, bits)) == n_batches


def test_nothing_is_kept_of_a_network_that_is_broken_anyway():
    """Infinite distance before and after is no success."""
    torch.manual_seed(0)
    net = nn.Linear(3, 4)
    broken = copy.deepcopy(net)
    broken.weight.data.fill_(torch.nan)
    made = {"nearest": broken, "gptq": copy.deepcopy(broken)}
    images = Images((), (), (), [Batch(torch.randn(16, 3))])
    chosen, ptq = keep_what_helps(net, images, PTQ(rounding="gptq"), lambda ptq, _judge: (made[ptq.rounding], []))
    assert chosen is broken
    assert ptq.rounding == "nearest"
    assert [(repair.option, repair.kept) for repair in repairs_of(chosen)] == [("rounding=gptq", False)]
