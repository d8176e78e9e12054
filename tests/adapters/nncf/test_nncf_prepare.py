"""Preparing: groups, refusals, what stays float, and what the user's model and screen look like afterwards."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from mpq_nncf import NNCFAdapter, internals, nncf_quantizers
from mpq_nncf.wiring import wiring_of
from nncf_cases import mixed_bits
from nncf_nets import images
from torch import nn
from torch.nn.utils import parametrizations

from mpq_plugins import BitConfig, FloatLayersWarning, Precision, build_space, find_layers
from mpq_plugins.errors import AdapterError
from mpq_plugins.quantizers.uniform import mse_scale, quantize


def uniform(model: nn.Module, example, precision: str) -> BitConfig:
    inventory = find_layers(model, example)
    return BitConfig({layer.name: Precision.parse(precision) for layer in inventory}, inventory.fingerprint)


def test_import_is_free():
    """Importing the adapter imports neither nncf nor openvino nor torch."""
    probe = "import sys, mpq_nncf; print([name for name in ('nncf', 'openvino', 'onnx', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_groups_are_the_layers_that_read_one_tensor(adapter, prepared):
    """The down-sampling shortcut shares with its block's first convolution; nothing is shared without merged branches."""
    case = prepared("residual")
    assert adapter.activation_groups(case.model, case.example) == (("b1", "downsample.0"),)
    assert NNCFAdapter(merge_branches=False).activation_groups(case.model, case.example) == ()
    zoo = prepared("zoo")
    assert adapter.activation_groups(zoo.model, zoo.example) == (("left", "right"),)


def test_conflicting_activation_bits_are_refused_unless_split(adapter, prepared):
    """Different bits on one quantizer name the layers and the tie; with private quantizers they are possible."""
    case = prepared("residual")
    bits = dict(case.bits.layers)
    bits["b1"], bits["downsample.0"] = Precision(4, 8), Precision(4, 3)
    asked = replace(case.bits, layers=bits)
    with pytest.raises(AdapterError, match=r"b1, downsample\.0 .*b1: 8, downsample\.0: 3.*mpq allocate.*merge_branches=false"):
        adapter.prepare(case.model, asked, case.example, [images(4)])
    split = NNCFAdapter(merge_branches=False)
    module = split.prepare(case.model, asked, case.example, [images(4)], batch_norm="kept")
    widths = {
        name: {nncf_quantizers.quantizer_at(module, hook).num_bits for hook in wiring_of(module)[name].activation}
        for name in ("b1", "downsample.0")
    }
    assert widths == {"b1": {8}, "downsample.0": {3}}


def test_tied_weights_must_agree(adapter, prepared):
    """Different weight bits for layers that hold one weight name both layers."""
    case = prepared("zoo")
    bits = {**case.bits.layers, "tied_a": Precision(2, case.bits["tied_a"].activation)}
    bits["tied_b"] = Precision(5, case.bits["tied_b"].activation)
    with pytest.raises(AdapterError, match="tied_a, tied_b hold the same weight"):
        adapter.prepare(case.model, replace(case.bits, layers=bits), case.example, [images(4)])


def test_shared_weights_have_one_quantizer(prepared):
    """All calls of a shared module and of tied layers use one weight quantizer."""
    module = prepared("zoo").module
    wiring = wiring_of(module)
    places = [*wiring["shared"].weight], [*wiring["tied_a"].weight, *wiring["tied_b"].weight]
    for hooks in places:
        assert len(hooks) == 2
        assert len({id(nncf_quantizers.quantizer_at(module, hook)) for hook in hooks}) == 1


def test_only_searched_layers_are_quantized(adapter, prepared):
    """An excluded layer keeps float weights and input; residual adds, pools and norms get no quantizer."""
    case = prepared("residual")
    bits = replace(case.bits, layers={k: v for k, v in case.bits.layers.items() if k not in ("a1", "fc")})
    module = adapter.prepare(case.model, bits, case.example, [images(4)], batch_norm="kept")
    wired = {hook for layer in wiring_of(module).values() for hook in (*layer.weight, *layer.activation)}
    assert {hook.name for hook in nncf_quantizers.hooks(module)} == wired
    assert set(wiring_of(module)) == set(bits.layers)
    assert not any(hook.operation.startswith(("a1/", "fc/")) for hook in nncf_quantizers.hooks(module))


def test_weights_use_every_code_and_the_best_range(adapter, prepared):
    """Two-bit weights use all four codes; their error is that of the reference search, below that of the largest magnitude."""
    case = prepared("residual")
    bits = uniform(case.model, case.example, "w2a8")
    errors = {}
    for weight_range in ("mse", "max"):
        module = adapter.prepare(
            case.model, bits, case.example, [images(4)], weight_range=weight_range, batch_norm="kept", bias_correction=False
        )
        quantizer = nncf_quantizers.quantizer_at(module, wiring_of(module)["b2"].weight[0])
        weight = case.model.b2.weight.detach()
        errors[weight_range] = float((quantizer(weight).detach() - weight).square().sum())
        codes = adapter.codes(module)["b2"]
        assert codes.min() >= -2
        assert codes.max() <= 1
    step = mse_scale(case.model.b2.weight.detach(), 2)
    reference = float((quantize(weight, step, 2) * step - weight).square().sum())
    assert errors["mse"] == pytest.approx(reference, rel=1e-4)
    assert errors["mse"] < 0.8 * errors["max"]
    module = adapter.prepare(case.model, bits, case.example, [images(4)], batch_norm="kept")
    assert {int(code) for code in adapter.codes(module)["b2"].reshape(-1)} == {-2, -1, 0, 1}


def test_model_and_screen_stay_as_they_were(adapter, prepared, tmp_path, capfd):
    """Preparing and exporting change nothing in the float model and print nothing."""
    case = prepared("residual")
    model = copy.deepcopy(case.model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    module = adapter.prepare(model, case.bits, case.example, [images(32)])
    for format in ("openvino-compact", "onnx"):
        adapter.export(module, tmp_path / format, case.example, format=format)
    assert model.training
    assert not hasattr(model, "__nncf_hooks")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capfd.readouterr().out == ""


def test_norms_keep_their_biases(adapter, prepared):
    """Statistics move, the affine parameters of normalisations do not: one shift is taken back once."""
    case = prepared("residual")
    norms = [name for name, child in case.model.named_modules() if isinstance(child, nn.BatchNorm2d)]
    bits = mixed_bits(case.model, case.example, adapter, seed=0)
    data = [images(32, seed=seed) for seed in (1, 2)]
    corrected = adapter.prepare(case.model, bits, case.example, data, held_out=0)
    kept = adapter.prepare(case.model, bits, case.example, data, batch_norm="kept")

    def unchanged(module: nn.Module, attribute: str) -> list[bool]:
        pairs = [(getattr(net.get_submodule(name), attribute) for net in (module, case.model)) for name in norms]
        return [torch.equal(*pair) for pair in pairs]

    assert all(unchanged(corrected, "bias"))
    assert not any(unchanged(corrected, "running_mean"))
    assert all(unchanged(kept, "bias"))
    assert all(unchanged(kept, "running_mean"))


def test_a_loader_and_a_list_give_the_same_ranges(adapter, prepared):
    """Batches from a DataLoader and from a list of the same batches calibrate alike."""
    case = prepared("residual")
    data, labels = images(16)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data, labels), batch_size=8)
    modules = [
        adapter.prepare(case.model, case.bits, case.example, source, batch_norm="kept")
        for source in (loader, [data[:8], data[8:]])
    ]
    with torch.no_grad():
        assert torch.equal(modules[0](data), modules[1](data))


def test_unusable_requests(adapter, prepared):
    """Binary weights and float modules are refused with their own errors; the rest is in tests/test_contracts.py."""
    case = prepared("residual")
    with pytest.raises(AdapterError, match="fc cannot be w1a8: NNCF has no binary weights"):
        adapter.prepare(case.model, replace(case.bits, layers={"fc": Precision(1, 8)}), case.example, [images(4)])
    with pytest.raises(AdapterError, match="was not made by NNCFAdapter"):
        adapter.codes(case.model)


def test_computed_weights_are_unconvertible(adapter):
    """A parametrized weight is no parameter, so the layer is named with the reason; plain layers are not."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, 2))
    parametrizations.weight_norm(model[0])
    example = images(2)[0]
    inventory = find_layers(model, example)
    for known in (None, example):
        reasons = adapter.unconvertible(model, inventory, known)
        assert set(reasons) == {"0"}
        assert "computed, not a parameter" in reasons["0"]


class Standardised(nn.Conv2d):
    """A convolution whose forward pass standardises the weight, which stays a parameter."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / (weight.std() + 1e-5), self.bias)


class Scaled(nn.Linear):
    """A linear layer that multiplies its weight by a constant before each call."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.5, self.bias)


@pytest.mark.parametrize("name", ["0", "3"])
def test_weights_computed_in_forward_are_refused_when_the_space_is_built(adapter, name):
    """What only NNCF's trace shows is known before anything is scored: such a layer is skipped with the reason."""
    kinds = {"0": (Standardised, nn.Linear), "3": (nn.Conv2d, Scaled)}[name]
    model = nn.Sequential(kinds[0](3, 4, 3), nn.ReLU(), nn.Flatten(), kinds[1](4 * 30 * 30, 2), nn.Linear(2, 2))
    with pytest.warns(FloatLayersWarning, match="NNCF's trace shows no operation that reads its weight"):
        space = build_space(model, images(2)[0], adapter=adapter)
    assert name in {item.name for item in space.skipped}
    assert name not in {layer.name for layer in space.layers}


def test_attention_internals_stay_float(adapter):
    """The layers inside nn.MultiheadAttention are no searched layers, and preparing leaves them alone."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.attention = nn.Conv2d(3, 8, 8, 8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    model, example = Net().eval(), images(2)[0]
    bits = uniform(model, example, "w4a8")
    assert set(bits.layers) == {"patch", "head"}
    module = adapter.prepare(model, bits, example, [example])
    assert not any("attention" in hook.operation for hook in nncf_quantizers.hooks(module) if hook.before)


def test_advice_tells_what_is_simulated(adapter, prepared):
    """Advice names simulated activations, stored widths, float kernels, and sums of w8a8 that saturate without VNNI."""
    case = prepared("residual")
    layers = find_layers(case.model, case.example)
    assert "CPUs without VNNI" in adapter.advice(layers["b2"], Precision(8, 8))
    assert "3-bit activations are simulated in f32" in adapter.advice(layers["b2"], Precision(8, 3))
    assert "stored as 6 bits" in adapter.advice(layers["b2"], Precision(5, 8))
    assert "runs in f32" in adapter.advice(layers["downsample.0"], Precision(4, 8))
    assert "runs in f32" not in adapter.advice(layers["b2"], Precision(4, 8))
    assert adapter.refuse(layers["b2"], Precision(2, 2)) is None


def test_other_versions_are_refused(monkeypatch):
    """A version outside the supported range, and a missing private name, are told with what to install."""
    import nncf

    internals.private.cache_clear()
    try:
        monkeypatch.setattr(nncf, "__version__", "2.19.0")
        with pytest.raises(AdapterError, match=r"NNCF 2\.19\.0 is installed.*pip install 'nncf>=3\.0,<4'"):
            internals.private()
        monkeypatch.undo()
        monkeypatch.setitem(internals._NAMES, "MinMaxQuantization.gone", internals._MIN_MAX)
        with pytest.raises(AdapterError, match=r"has no .*MinMaxQuantization\.gone"):
            internals.private()
    finally:
        internals.private.cache_clear()
