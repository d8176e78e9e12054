"""On a GPU: scores are those of the CPU, adapters prepare where the model is, training steps run and are resumed."""

import copy

import pytest
import torch
from mpq_brevitas import BrevitasAdapter
from mpq_nncf import NNCFAdapter
from torch import nn

import mpq_plugins as mpq
from mpq_plugins import BitConfig, build_space, find_layers
from mpq_plugins.common.plugins import make
from mpq_plugins.training import ProfitSchedule, TrainingRecipe, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

IMAGES = torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))
BATCHES = [(part, None) for part in IMAGES.split(8)]
PROXIES = {
    "kl-divergence": {},
    "output-error": {},
    "fisher": {},
    "weight-error": {},
    "hessian-trace": {"n_probes": 4},
    "clado": {"tier": "gram"},
    "clado fisher": {"tier": "fisher"},
    "ompq": {},
    "csmpq": {},
}


def network():
    """Convolutions with batch normalisation, one of them depthwise, and a classifier."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6()),
        *(nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )
    net.train()(IMAGES)
    return net.eval()


@pytest.fixture(autouse=True)
def exact_products():
    """Single precision as the CPU has it."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.mark.parametrize("name", PROXIES)
def test_scores_are_those_of_the_cpu(name):
    """Losses and cross terms, up to the rounding of sums."""
    net = network()
    found = []
    for device in ("cpu", "cuda"):
        space = build_space(net.to(device), IMAGES[:1], choices=mpq.menu((2, 4, 8), (4, 8)))
        found.append(make("proxies", name.split()[0], PROXIES[name]).score(net, space, BATCHES))
    largest = max(abs(value) for row in found[0].loss for value in row)
    for cpu, cuda in zip(found[0].loss, found[1].loss, strict=True):
        assert cuda == pytest.approx(cpu, rel=0.02, abs=2e-3 * largest)
    if found[0].pairwise is not None:
        assert abs(found[0].pairwise - found[1].pairwise).max() < 2e-3 * largest + 0.02 * abs(found[0].pairwise).max()


ADAPTERS = {"layerwise": lambda: BrevitasAdapter(), "finn": lambda: BrevitasAdapter("finn"), "nncf": lambda: NNCFAdapter()}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_prepare_where_the_model_is(name):
    """Module and outputs stay on the GPU and are those of the CPU; bits are the ones asked for, also after set_bits."""
    outputs, net, adapter = [], network(), ADAPTERS[name]()
    for device in ("cpu", "cuda"):
        net = net.to(device)
        inventory = find_layers(net, IMAGES[:1])
        bits = BitConfig({layer.name: "w4a8" for layer in inventory}, inventory.fingerprint)
        module = adapter.prepare(net, bits, IMAGES[:1], BATCHES)
        with torch.no_grad():
            outputs.append(module(IMAGES.to(device)).cpu())
        assert {tensor.device.type for tensor in module.state_dict().values()} == {device}
    assert float((outputs[0] - outputs[1]).abs().mean() / outputs[0].std()) < 0.02
    copied = copy.deepcopy(module)
    with torch.no_grad():
        assert torch.equal(copied(IMAGES.cuda()).cpu(), outputs[1])


@pytest.mark.parametrize("method", ["qat", "profit"])
@pytest.mark.parametrize("name", ["layerwise", "nncf"])
def test_training_runs_and_resumes(name, method, tmp_path):
    """The loss is finite and falls against the start; a run that was done is read back as it was."""
    net, adapter = network().cuda(), ADAPTERS[name]()
    inventory = find_layers(net, IMAGES[:1])
    bits = BitConfig({layer.name: "w4a4" for layer in inventory}, inventory.fingerprint)
    recipe = TrainingRecipe(epochs=4, learning_rate=0.02, method=method, profit=ProfitSchedule(widths=(6,), float_epochs=0))
    data = [(part, torch.arange(len(part)) % 10) for part in IMAGES.split(8)] * 4
    runs = [
        train(net, bits, data, adapter=adapter, recipe=recipe, example=IMAGES[:1], calibration=BATCHES, folder=tmp_path)
        for _ in range(2)
    ]
    first, last = runs[0].history[0].loss, runs[0].history[-1].loss
    assert last < first
    assert [record.loss for record in runs[1].history] == [record.loss for record in runs[0].history]
    with torch.no_grad():
        assert torch.equal(runs[0].module(IMAGES.cuda()), runs[1].module(IMAGES.cuda()))
