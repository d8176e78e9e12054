"""Bits switched in place, float weights for a while, and training on with both."""

import copy

import numpy as np
import pytest
import torch
from brevitas_nets import images, mixed_bits, network
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas import internals as brevitas

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.errors import AdapterError, FingerprintError, UnknownLayerError

PLAIN = {"bias_correction": False, "batch_norm": "kept"}
ADAPTERS = {
    "layerwise": BrevitasAdapter(),
    "finn": BrevitasAdapter("finn"),
    "duq": BrevitasAdapter(quantizer="duq"),
    "power-of-two": BrevitasAdapter("finn", scales="power-of-two"),
}
RANGES = [("mse", "mse"), ("max", "max")]
WAYS = [
    *((name, *ranges) for name in ("layerwise", "finn") for ranges in RANGES),
    ("layerwise", "mse", "default"),
    ("duq", "mse", "default"),
    ("power-of-two", "mse", "percentile"),
]


def uniform(model, example, precision):
    inventory = find_layers(model, example)
    return BitConfig(dict.fromkeys((layer.name for layer in inventory), Precision.parse(precision)), inventory.fingerprint)


def activation_scales(module):
    return [float(proxy.scale().detach()) for proxy in brevitas.activation_proxies(module)]


class TestSetBits:
    @pytest.mark.parametrize(("name", "weight_range", "activation_range"), WAYS)
    def test_equals_preparing_at_the_new_bits(self, name, weight_range, activation_range, tmp_path):
        """8 bits switched to a mixture: codes and names of a fresh module, close activation scales; saved and exported."""
        model, example, adapter = network("residual"), images(), ADAPTERS[name]
        options = {**PLAIN, "weight_range": weight_range, "activation_range": activation_range}
        module = adapter.prepare(model, uniform(model, example, "w8a8"), example, [example], **options)
        parameters = dict(module.named_parameters())
        target = mixed_bits("residual", model)
        fresh = adapter.prepare(model, target, example, [example], **options)
        assert adapter.set_bits(module, target, [example]) is module
        assert bits_of(module) == target
        assert all(parameter is parameters[key] for key, parameter in module.named_parameters())
        assert list(module.state_dict()) == list(fresh.state_dict())
        for layer, codes in adapter.codes(fresh).items():
            np.testing.assert_array_equal(adapter.codes(module)[layer], codes)
        # Activations are measured with 8-bit quantizers in front, those of a fresh module without any; DuQ's clip 5 % of them.
        for ours, theirs in zip(activation_scales(module), activation_scales(fresh), strict=True):
            assert ours == pytest.approx(theirs, rel=0.1 if name == "duq" else 0.02)
        loaded = adapter.load(model, adapter.save(module, tmp_path / "m.pt"), example)
        assert torch.equal(loaded(example), module(example))
        assert adapter.read_bits(adapter.export(loaded, tmp_path / "m.onnx", example)) == target

    def test_ranges_are_those_of_the_module_as_it_stands(self):
        """Statistics of a trained module belong to its quantized activations: ranges are fitted to those."""
        model, example, adapter = network("residual"), images(), BrevitasAdapter()
        module = adapter.prepare(model, uniform(model, example, "w8a3"), example, [example], **PLAIN)
        seen = []
        handle = module.conv2.register_forward_pre_hook(lambda _layer, inputs: seen.append(brevitas.plain(inputs[0])))
        with torch.no_grad():
            module(example)
        handle.remove()
        kept = float(module.fc.input_quant.scale().detach())
        bits = uniform(model, example, "w8a2")
        adapter.set_bits(module, BitConfig({**bits.layers, "fc": Precision(8, 3)}, bits.fingerprint), [example])
        steps = torch.linspace(0.01, 1, 3000) * float(seen[0].max()) / 3
        errors = [float((seen[0] - torch.round(seen[0] / step).clamp(0, 3) * step).square().sum()) for step in steps]
        found = float(module.conv2.input_quant.scale().detach())
        assert found == pytest.approx(float(steps[int(np.argmin(errors))]), rel=0.02)
        assert float(module.fc.input_quant.scale().detach()) == kept

    def test_copies_are_switched_on_their_own(self):
        """A deep copy gets the codes of the module switched itself, which stays as it was."""
        model, example, adapter = network("residual"), images(), BrevitasAdapter()
        module = adapter.prepare(model, uniform(model, example, "w8a8"), example, [example], **PLAIN)
        before = adapter.codes(module)
        switched = adapter.set_bits(copy.deepcopy(module), uniform(model, example, "w3a8"))
        for layer, codes in adapter.codes(module).items():
            np.testing.assert_array_equal(codes, before[layer])
        for layer, codes in adapter.codes(adapter.set_bits(module, uniform(model, example, "w3a8"))).items():
            np.testing.assert_array_equal(codes, adapter.codes(switched)[layer])

    def test_float_weights_meanwhile(self):
        """Weights switched while they pass unquantized have, quantized again, the codes of those switched as usual."""
        model, example, adapter = network("residual"), images(), BrevitasAdapter()
        module = adapter.prepare(model, uniform(model, example, "w8a8"), example, [example], **PLAIN)
        usual = adapter.set_bits(copy.deepcopy(module), uniform(model, example, "w3a8"))
        adapter.set_bits(adapter.use_float_weights(module), uniform(model, example, "w3a8"))
        assert torch.equal(brevitas.plain(module.conv1.quant_weight()), module.conv1.weight)
        assert all(torch.equal(value, module.state_dict()[name]) for name, value in usual.state_dict().items())
        for layer, codes in adapter.codes(adapter.use_float_weights(module, False)).items():
            np.testing.assert_array_equal(codes, adapter.codes(usual)[layer])

    def test_thresholds_stay_without_data(self):
        """Without calibration an activation's threshold stays: its scale grows by the ratio of the numbers of codes."""
        model, example, adapter = network("residual"), images(), BrevitasAdapter()
        module = adapter.prepare(model, uniform(model, example, "w8a8"), example, [example], **PLAIN)
        before = float(module.conv1.input_quant.scale().detach())
        adapter.set_bits(module, uniform(model, example, "w8a4"))
        assert float(module.conv1.input_quant.scale().detach()) == pytest.approx(before * 255 / 15, rel=1e-6)

    def test_refusals_change_nothing(self):
        """Unknown layers, another model's bits and unequal bits at an add are refused before anything is switched."""
        model, example, adapter = network("residual"), images(), BrevitasAdapter("finn")
        bits = uniform(model, example, "w8a8")
        module = adapter.prepare(model, bits, example, [example], **PLAIN)
        expected = module(example)
        unequal = {**uniform(model, example, "w2a8").layers, "down": Precision(2, 4)}
        for error, wrong in (
            (UnknownLayerError, BitConfig({"conv1": Precision(2, 2), "none": Precision(2, 2)}, "")),
            (FingerprintError, BitConfig({"conv1": Precision(2, 2)}, "sha256:other")),
            (AdapterError, BitConfig(unequal, bits.fingerprint)),
            (AdapterError, BitConfig({"conv1": Precision(2, 2)}, bits.fingerprint)),
        ):
            with pytest.raises(error):
                adapter.set_bits(module, wrong)
            assert bits_of(module) == bits
            assert torch.equal(module(example), expected)

    def test_checkpoints_of_the_first_release(self, tmp_path):
        """A checkpoint whose recipe has three keys and whose max ranges are computed from the weights still loads."""
        import json

        from mpq_brevitas.convert import convert
        from mpq_brevitas.options import BrevitasOptions, options_of

        model, example, adapter = network("residual"), images(), BrevitasAdapter()
        bits = uniform(model, example, "w4a4")
        module = adapter.prepare(model, bits, example, [example], weight_range="max", **PLAIN)
        old = BrevitasOptions("layerwise", "max", options_of(module).signed, weight_scale="statistics")
        state = convert(model, bits, old).module.state_dict()
        document = torch.load(adapter.save(module, tmp_path / "m.pt"), weights_only=True)
        document["recipe"] = json.dumps({"profile": "layerwise", "weight_range": "max", "signed": dict(old.signed)})
        document["state_dict"] = {key: value for key, value in document["state_dict"].items() if _is_old(key, state)}
        torch.save(document, tmp_path / "old.pt")
        loaded = adapter.load(model, tmp_path / "old.pt", example)
        torch.testing.assert_close(loaded(example), module(example), rtol=0, atol=1e-5)


def _is_old(key, state):
    return key in state or "input_quant" in key


class TestFloatWeights:
    @pytest.mark.parametrize("name", ["layerwise", "finn", "duq"])
    def test_weights_pass_and_come_back(self, name, tmp_path):
        """Layers compute with their weights as they are, in training too; the state is the same; then codes are back."""
        model, example, adapter = network("residual"), images(), ADAPTERS[name]
        module = adapter.prepare(model, uniform(model, example, "w2a8"), example, [example], **PLAIN)
        state, quantized, codes = list(module.state_dict()), module(example), adapter.codes(module)
        assert adapter.use_float_weights(module) is module
        for layer in (module.conv1, module.train().conv2):
            assert torch.equal(brevitas.plain(layer.quant_weight()), layer.weight)
        module.eval()
        assert list(module.state_dict()) == state
        with pytest.raises(AdapterError, match="use_float_weights"):
            adapter.export(module, tmp_path / "m.onnx", example)
        assert not torch.allclose(module(example), quantized)
        loaded = adapter.load(model, adapter.save(module, tmp_path / "m.pt"), example)
        adapter.use_float_weights(module, False)
        assert torch.equal(module(example), quantized)
        assert torch.equal(loaded(example), quantized)
        for layer, expected in codes.items():
            np.testing.assert_array_equal(adapter.codes(module)[layer], expected)

    @pytest.mark.parametrize("name", ["layerwise", "duq"])
    def test_ranges_follow_the_weights(self, name):
        """Weights that doubled meanwhile get the codes and twice the scale that they had."""
        model, example, adapter = network("residual"), images(), ADAPTERS[name]
        module = adapter.prepare(model, uniform(model, example, "w3a8"), example, [example], **PLAIN)
        codes, layer = adapter.codes(module), module.conv1
        before = brevitas.plain(layer.quant_weight()).detach().clone()
        adapter.use_float_weights(module)
        with torch.no_grad():
            layer.weight.mul_(2)
        adapter.use_float_weights(module, False)
        np.testing.assert_array_equal(adapter.codes(module)["conv1"], codes["conv1"])
        assert torch.allclose(brevitas.plain(layer.quant_weight()), 2 * before, rtol=1e-3)

    def test_only_weights(self):
        """With float weights and 8-bit activations the module is close to the float model whatever its weight bits."""
        model, example, adapter = network("residual"), images(), BrevitasAdapter()
        module = adapter.prepare(model, uniform(model, example, "w2a8"), example, [example], **PLAIN)
        adapter.use_float_weights(module)
        with torch.no_grad():
            expected = model(example)
            assert (module(example) - expected).abs().max() < 0.05 * expected.abs().max()


class TestTraining:
    @pytest.mark.parametrize(("name", "weight_range"), [*((name, "mse") for name in ADAPTERS), ("layerwise", "max")])
    def test_stages(self, name, weight_range, tmp_path):
        """Float weights, then lowered bits: weights, biases and every range learn; the export holds what was trained."""
        model, example, adapter = network("residual"), images(), ADAPTERS[name]
        module = adapter.prepare(
            model, uniform(model, example, "w8a8"), example, [example], weight_range=weight_range, bias_correction=False
        )
        target = uniform(model, example, "w4a4")
        _step(adapter.use_float_weights(module.train()), example)
        adapter.set_bits(adapter.use_float_weights(module, False), target)
        before = copy.deepcopy(module.state_dict())
        _step(module, example)
        after = module.state_dict()
        moved = {key for key in before if not torch.equal(before[key], after[key])}
        for kind in _learned_kinds(name):
            assert any(kind in key for key in moved), kind
        path = adapter.export(module.eval(), tmp_path / "m.onnx", example)
        assert adapter.read_bits(path) == target
        for layer, codes in adapter.codes(module).items():
            np.testing.assert_array_equal(adapter.read_codes(path)[layer], codes)


def _learned_kinds(name):
    ranges = ("weight_quant.tensor_quant.scaling_impl.value", "tensor_quant.scaling_impl.value")
    if name == "duq":
        ranges = ("weight_quant.tensor_quant.duq.alpha", "input_quant.fused_activation_quant_proxy.tensor_quant.duq.gamma")
    return ("conv1.weight", "conv1.bias" if "finn" in name or name == "power-of-two" else "bn1.weight", *ranges)


def _step(module, example):
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    loss = module(example).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
