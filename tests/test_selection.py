"""Top-k selection by measured loss, and measurements that outlive the process that made them."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import mpq_plugins as mpq
from mpq_plugins.cli.parser import main
from mpq_plugins.digits import DigitsNet, digits
from mpq_plugins.errors import BudgetError, DataError, PluginError
from mpq_plugins.proxies import CLADO, Projection
from mpq_plugins.proxies.measuring import MeasurementOptions, SensitivityRun, keeping_measurements
from mpq_plugins.proxies.measuring.cache import MeasurementCache, digest_of_model
from mpq_plugins.solvers.solution import Status

MODEL = "mpq_plugins.digits:DigitsNet"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return DigitsNet(width=8).eval()


@pytest.fixture
def batches():
    return digits(train=True, batch_size=32)[:2]


def space_of(net, widths=(2, 4, 8)):
    example = digits(train=True, batch_size=1)[0].inputs
    return mpq.build_space(net, example, choices=mpq.menu(widths), pin={"layer1.*": "w8a8", "layer2.*": "w8a8"})


def test_the_plan_of_least_measured_loss_is_kept(net):
    """Of five plans the fourth measures best: it is kept, with the score's bound, and the gain is the difference."""
    space = space_of(net)
    scores = Projection().score(net, space)
    first = mpq.solve_scores(scores, {"size": "w4"})
    asked = []

    def measure(plans):
        asked.extend(plans)
        return [5.0, 4.0, 3.0, 1.0, 2.0]

    kept = mpq.solve_scores(scores, {"size": "w4"}, top_k=5, measure=measure)
    assert len({tuple(plan) for plan in asked}) == 5
    assert kept.selection.kept == 3
    assert kept.selection.gain == pytest.approx(4.0)
    chosen = {name: str(precision) for name, precision in space.assignment(asked[3]).items()}
    assert {name: str(precision) for name, precision in kept.bits.layers.items()} == chosen
    assert kept.solution.status is Status.feasible
    assert kept.solution.bound == first.solution.bound
    assert kept.solution.objective >= first.solution.objective
    assert kept.bits.costs["size"] <= mpq.Budget(mpq.costs.WeightSize(), "w4").resolve(space)
    assert kept.bits.origin["selection"]["measured"] == [5.0, 4.0, 3.0, 1.0, 2.0]


def test_ties_go_to_the_score_and_one_plan_switches_the_selection_off(net):
    """With equal measurements the score's own plan stays; with top_k = 1 nothing is measured."""
    scores = Projection().score(net, space_of(net))
    first = mpq.solve_scores(scores, {"size": "w4"})
    tied = mpq.solve_scores(scores, {"size": "w4"}, top_k=4, measure=lambda plans: [1.0] * len(plans))
    assert (tied.bits.layers, tied.selection.kept) == (first.bits.layers, 0)
    assert mpq.solve_scores(scores, {"size": "w4"}, measure=lambda plans: 1 / 0).selection is None
    with pytest.raises(BudgetError, match="top_k is 0"):
        mpq.solve_scores(scores, {"size": "w4"}, top_k=0)


def test_choices_dropped_by_a_peak_limit_do_not_shift_the_plans(net):
    """With a limit on activation memory the measured plans are those of the bit configuration, in the space's own choices."""
    space = mpq.build_space(net, digits(train=True, batch_size=1)[0].inputs, choices=mpq.menu((2, 4, 8), (2, 4, 8)))
    scores = Projection().score(net, space)
    asked = []

    def measure(plans):
        asked.extend(plans)
        return [float(len(plans) - at) for at in range(len(plans))]

    kept = mpq.solve_scores(scores, {"size": "w4", "activation_memory": "w8a4"}, top_k=3, measure=measure)
    assert space.assignment(asked[-1]) == dict(kept.bits.layers)


def test_measured_losses_are_those_of_a_quantized_copy(net, batches):
    """The measured loss of a plan equals the cross-entropy of a copy whose weights hold the reference quantizer's values."""
    import copy

    from mpq_plugins.quantizers.uniform import mse_scale, quantize

    space = space_of(net)
    plan = [len(unit.choices) - 1 - index % len(unit.choices) for index, unit in enumerate(space.units)]
    lab = SensitivityRun(net, space, batches, MeasurementOptions(correction=False))
    twin = copy.deepcopy(net)
    for name, precision in space.assignment(plan).items():
        weight = dict(twin.named_modules())[name].weight.data
        scale = mse_scale(weight, precision.weight)
        weight.copy_(quantize(weight, scale, precision.weight) * scale)
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(twin(b.inputs), b.labels, reduction="sum") for b in batches]
    assert lab.losses_at([plan])[0] == pytest.approx(float(sum(losses)) / 64, rel=1e-5)


def test_selection_on_the_command_line(tmp_path, monkeypatch, capsys):
    """`--top-k` prints what was measured and writes it into the bit configuration."""
    monkeypatch.chdir(tmp_path)
    words = ["allocate", "--model", MODEL, "--data", "digits", "--images", "64", "--bits", "2,4,8", "--budget", "size=w4"]
    assert main([*words, "--proxy", "clado", "--top-k", "4", "--plot", "bits.svg", "--quiet"]) == 0
    assert "measured loss of the best 4 plans" in capsys.readouterr().out
    selection = json.loads((tmp_path / "bits.json").read_text())["origin"]["selection"]
    assert selection["measured"][selection["kept"]] == min(selection["measured"])
    # Bits, sizes, losses and interactions, two of them with a colour bar.
    assert 'id="axes_6"' in (tmp_path / "bits.svg").read_text()


def test_an_unused_budget_is_told(tmp_path, monkeypatch, capsys):
    """A score that likes narrow weights leaves the budget unused, which is told; one that spends it is not talked to."""
    monkeypatch.chdir(tmp_path)
    net = DigitsNet().eval()
    space = space_of(net)
    for sign, told in ((1.0, True), (-1.0, False)):
        loss = tuple(tuple(sign * choice.weight for choice in unit.choices) for unit in space.units)
        mpq.Scores(space, loss, {"name": "by hand"}).save("scores.json")
        assert main(["solve", "scores.json", "--budget", "size=w4", "--quiet"]) == 0
        assert ("much of every budget is unused" in capsys.readouterr().out) is told


def test_the_loss_of_a_choice_alone_has_half_the_diagonal(net):
    """Linear loss 1 and 2, pairwise diagonal 4 and 6: alone they lose 3 and 5."""
    space = space_of(net, (2, 8))
    n_choices = sum(len(unit.choices) for unit in space.units)
    first = next(index for index, unit in enumerate(space.units) if space.is_free(unit))
    loss = tuple((1.0, 2.0) if index == first else (0.0,) * len(unit.choices) for index, unit in enumerate(space.units))
    pairwise = np.zeros((n_choices, n_choices))
    at = sum(len(unit.choices) for unit in space.units[:first])
    pairwise[at, at], pairwise[at + 1, at + 1] = 4.0, 6.0
    assert mpq.Scores(space, loss, {}, pairwise=pairwise).alone()[first] == (3.0, 5.0)


class Passes:
    """Counts the forward passes of a network."""

    def __init__(self, net):
        self.count = 0
        net.register_forward_hook(self._add)

    def _add(self, *_):
        self.count += 1


@pytest.mark.parametrize("tier", ["gram", "exact", "fisher"])
def test_kept_measurements_need_no_forward_pass(net, batches, tmp_path, tier):
    """A second score of the same question reads the journal and gives the same numbers; other data are measured anew."""
    space, proxy, passes = space_of(net, (2, 8)), CLADO(tier=tier, n_images=64), Passes(net)
    with keeping_measurements(tmp_path):
        first, n_first = proxy.score(net, space, batches), passes.count
        second = proxy.score(net, space, batches)
        assert passes.count == n_first > 0
        proxy.score(net, space, batches[:1])
        assert passes.count > n_first
    assert second.loss == first.loss
    assert np.array_equal(second.pairwise, first.pairwise)
    assert second.facts == first.facts


def test_other_weights_are_measured_anew(net, batches, tmp_path):
    """The journal tells networks apart by their weights, not only by their layers."""
    space, proxy = space_of(net, (2, 8)), CLADO(n_images=64)
    with keeping_measurements(tmp_path):
        first = proxy.score(net, space, batches)
        with torch.no_grad():
            net.fc.bias.add_(torch.arange(10.0))
        assert proxy.score(net, space, batches).loss != first.loss


def test_a_damaged_file_is_measured_again(net, batches, tmp_path):
    """A measurement cut off on disk is not believed."""
    space, proxy = space_of(net, (2, 8)), CLADO(n_images=64)
    with keeping_measurements(tmp_path):
        first = proxy.score(net, space, batches)
        for path in tmp_path.rglob("*.safetensors"):
            path.write_bytes(path.read_bytes()[:40])
        assert proxy.score(net, space, batches).loss == first.loss


def test_a_cache_that_is_deleted_meanwhile_changes_nothing(net, batches, tmp_path, monkeypatch):
    """Each kept file goes at once: pairs and the losses of whole plans, in their order, are those measured without a cache."""
    space, proxy = space_of(net, (2, 8)), CLADO(n_images=64)
    put = MeasurementCache.put

    def put_and_lose(journal, key, arrays):
        put(journal, key, arrays)
        shutil.rmtree(tmp_path)

    def measured():
        lab = SensitivityRun(net, space, batches, MeasurementOptions(n_images=64))
        return proxy.score(net, space, batches), lab.losses_at(choices)

    choices = [[0] * len(space.units), [len(unit.choices) - 1 for unit in space.units]]
    wanted, losses = measured()
    monkeypatch.setattr(MeasurementCache, "put", put_and_lose)
    with keeping_measurements(tmp_path):
        found, again = measured()
    assert found.loss == wanted.loss
    assert np.array_equal(found.pairwise, wanted.pairwise)
    assert again == losses
    assert len(set(losses)) == 2


KILLED = """
import os, signal, sys, torch
from mpq_plugins.digits import DigitsNet, digits
from mpq_plugins.proxies import CLADO
from mpq_plugins.proxies.measuring import keeping_measurements
from mpq_plugins.proxies.measuring.cache import MeasurementCache
import mpq_plugins as mpq

torch.set_num_threads(1)
kept, put = [], MeasurementCache.put

def put_and_die(self, key, arrays):
    put(self, key, arrays)
    kept.append(key)
    if len(kept) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

MeasurementCache.put = put_and_die
torch.manual_seed(0)
net = DigitsNet(width=8).eval()
space = mpq.build_space(
    net, digits(train=True, batch_size=1)[0].inputs, choices=mpq.menu((2, 4, 8)), pin={"layer1.*": "w8a8", "layer2.*": "w8a8"}
)
with keeping_measurements(sys.argv[1]):
    CLADO(n_images=64).score(net, space, digits(train=True, batch_size=32)[:2])
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 on this system")
def test_a_killed_run_goes_on_where_it_stopped(net, batches, tmp_path):
    """After `kill -9` within the second batch the same numbers come out, and measured units are not measured again."""
    space, proxy = space_of(net), CLADO(n_images=64)
    passes = Passes(net)
    whole = proxy.score(net, space, batches)
    n_whole, passes.count = passes.count, 0
    n_free = sum(map(space.is_free, space.units))
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(n_free + 1 + n_free // 2)], env=environment, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    with keeping_measurements(tmp_path):
        resumed = proxy.score(net, space, batches)
    assert resumed.loss == whole.loss
    assert np.array_equal(resumed.pairwise, whole.pairwise)
    # The float pass and the base pass, which has units without a choice, of the batch that was cut off ran twice.
    more = resumed.facts["layer_evaluations"] - whole.facts["layer_evaluations"]
    assert 0 < more <= 2 * 32 * len(space.layers)
    assert passes.count < 0.8 * n_whole


def scaled_loss(factor):
    def loss(output, batch):
        return factor * torch.nn.functional.cross_entropy(output, batch.labels, reduction="none")

    return loss


def base_loss_of(net, space, batches, **options):
    return SensitivityRun(net, space, batches, MeasurementOptions(**options)).effects().base_loss


def test_functions_of_one_name_are_told_apart(net, batches, tmp_path):
    """Losses made by one function, and outputs chosen by two lambdas, are not taken for one another in a kept folder."""
    space = space_of(net)
    with keeping_measurements(tmp_path):
        once = base_loss_of(net, space, batches, loss=scaled_loss(1.0))
        assert base_loss_of(net, space, batches, loss=scaled_loss(3.0)) == pytest.approx(3 * once)
        own = base_loss_of(net, space, batches, output=lambda out: out)
        assert base_loss_of(net, space, batches, output=lambda out: 0 * out) != pytest.approx(own)


class Activated(torch.nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.net, self.activation = DigitsNet(width=8), activation

    def forward(self, images):
        return self.activation(self.net(images))


def test_models_of_equal_weights_are_told_apart(batches):
    """Equal weights under another activation function make another model; the same model built again is the same."""
    torch.manual_seed(0)
    relu = Activated(torch.nn.ReLU())
    gelu, again = Activated(torch.nn.GELU()), Activated(torch.nn.ReLU())
    gelu.load_state_dict(relu.state_dict())
    again.load_state_dict(relu.state_dict())
    assert digest_of_model(relu) == digest_of_model(again)
    assert digest_of_model(relu) != digest_of_model(gelu)


def test_plans_that_break_the_model_are_told(net, batches):
    """A loss that is not finite at a quantized plan is an error that names the way out, not a plan that compares as least."""
    lab = SensitivityRun(
        net, space_of(net), batches, MeasurementOptions(loss=lambda output, batch: output.sum(1) * float("nan"))
    )
    with pytest.raises(DataError, match="1 of 1 quantized plans is not finite"):
        lab.losses_at([[0] * len(lab.space.units)])


@pytest.mark.parametrize("option", ["n_samples", "memory_mb"])
def test_negative_options_are_refused(option):
    """Options that count or bound something are refused below zero, by name and value."""
    with pytest.raises(PluginError, match=f"{option} is -1"):
        CLADO(**{option: -1}).setup()


def test_plans_of_any_score_are_measured_on_the_named_output(batches, monkeypatch, tmp_path, capsys):
    """A model that returns a dict is measured at the output that the command line names, though the score looks at none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\nfrom mpq_plugins.digits import DigitsNet\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.net = DigitsNet(width=8)\n"
        "    def forward(self, x):\n        return {'logits': self.net(x), 'mean': x.mean()}\n"
    )
    verb = ["allocate", "--model", "net.py:Net", "--data", "digits", "--images", "8", "--budget", "size=w4", "--no-cache"]
    assert main([*verb, "--proxy", "uniform", "--output", "logits", "--top-k", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["selection"]["measured"]) == 3


def test_a_cache_that_cannot_be_written(net, batches, tmp_path, monkeypatch, capsys):
    """A folder asked for must take measurements; the user's cache, which nobody asked for, is done without."""
    (tmp_path / "file").touch()
    verb = ["allocate", "--model", MODEL, "--data", "digits", "--images", "8", "--proxy", "fisher", "--budget", "size=w4"]
    verb += ["--out", str(tmp_path / "bits.json")]
    assert main([*verb, "--cache", str(tmp_path / "file")]) == 2
    assert "--no-cache" in capsys.readouterr().err
    monkeypatch.setattr("mpq_plugins.common.files.cache_folder", lambda: tmp_path / "file" / "mpq-plugins")
    assert main(verb) == 0
    assert "no measurements are kept" in capsys.readouterr().err
