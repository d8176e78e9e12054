"""Post-training quantization by name: ranges, equalization, rounding; refusals."""

import functools

import numpy as np
import pytest
import torch
from brevitas_nets import CASES, mixed_bits, network
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas import internals as brevitas
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.errors import AdapterError
from mpq_plugins.model.run import Batch
from mpq_plugins.training import reestimate_batch_norm

PLAIN = {"bias_correction": False, "batch_norm": "kept"}


def uniform(model, example, precision="w3a4"):
    inventory = find_layers(model, example)
    return BitConfig(dict.fromkeys((layer.name for layer in inventory), Precision.parse(precision)), inventory.fingerprint)


def smooth_images(n=16):
    """Images whose neighbouring pixels are alike, as in photographs: rounding that sees the data can use that."""
    coarse = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    return nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear")


@functools.cache
def prepared(profile, precision="w3a8", **options):
    model, images = network("residual"), smooth_images()
    bits = uniform(model, images, precision)
    return model, BrevitasAdapter(profile).prepare(model, bits, images, [images[:8], images[8:]], **PLAIN, **options)


def outputs_of(module, name, images):
    found = []
    handle = module.get_submodule(name).register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.no_grad():
        module(images)
    handle.remove()
    return brevitas.plain(found[0])


class TestActivationRanges:
    @pytest.mark.parametrize("rule", ["default", "percentile", "max", "mse"])
    def test_threshold_of_the_first_layer(self, rule):
        """The first input's largest code stands for what numpy finds on the images: percentile, maximum or least error."""
        images = smooth_images()
        _, module = prepared("layerwise", "w3a4", activation_range=rule)
        found = float(module.stem.input_quant.scale().detach()) * 8  # signed, 4 bits: the scale is T / 2^3
        batches = [np.abs(images[part].numpy()).ravel() for part in (slice(8), slice(8, 16))]
        if rule in ("mse", "default"):
            thresholds = np.geomspace(0.05, 1, 2000) * max(map(np.max, batches))
            expected = _best_threshold(images[:16].numpy().ravel(), thresholds)
        elif rule == "max":
            expected = max(map(np.max, batches))
        else:
            expected = np.mean([np.sort(batch)[int(0.99999 * batch.size + 0.5) - 1] for batch in batches])
        assert found == pytest.approx(expected, rel=0.02 if rule in ("mse", "default") else 1e-5)

    def test_adds_share_a_threshold(self):
        """In the finn profile the operands of an add still have one scale after ranges were fitted to least error."""
        _, module = prepared("finn", "w3a4", activation_range="mse")
        from mpq_brevitas.groups import activation_groups_of_graph

        shared = [group for group in activation_groups_of_graph(module) if len(group.quantizers) > 1]
        assert shared
        for group in shared:
            assert len({float(module.get_submodule(name).act_quant.scale().detach()) for name in group.quantizers}) == 1


def _best_threshold(values, thresholds):
    errors = []
    for threshold in thresholds:
        step = threshold / 8
        errors.append(np.square(values - step * np.clip(np.round(values / step), -8, 7)).sum())
    return thresholds[int(np.argmin(errors))]


class TestRounding:
    @pytest.mark.parametrize("profile", ["layerwise", "finn"])
    @pytest.mark.parametrize("method", ["gptq", "gpfq", "qronos", "learned"])
    def test_outputs_come_closer_to_the_float_model(self, method, profile):
        """Last layer before the classifier: the error of its output is below nearest rounding's."""
        images = smooth_images()
        model, nearest = prepared(profile)
        _, module = prepared(profile, rounding=method, rounding_steps=60)
        with torch.no_grad():
            expected = model(images)
            ours, theirs = ((part(images) - expected).square().mean() for part in (module, nearest))
        assert ours < theirs

    @pytest.mark.parametrize("method", ["gptq", "gpfq", "qronos", "learned"])
    def test_quantizers_are_ordinary_afterwards(self, method, tmp_path):
        """The same state as with nearest rounding, saved and loaded; the file has the codes; scales are the nearest's."""
        adapter, images = BrevitasAdapter(), smooth_images()
        model, nearest = prepared("layerwise")
        _, module = prepared("layerwise", rounding=method, rounding_steps=60)
        assert list(module.state_dict()) == list(nearest.state_dict())
        assert "forward" not in vars(module)
        for name in ("conv1", "fc"):
            scale = brevitas.learned_scale(module.get_submodule(name).weight_quant)
            assert torch.equal(scale, brevitas.learned_scale(nearest.get_submodule(name).weight_quant))
        loaded = adapter.load(model, adapter.save(module, tmp_path / "m.pt"), images)
        assert torch.equal(loaded(images), module(images))
        path = adapter.export(module, tmp_path / "m.onnx", images)
        for name, codes in adapter.codes(module).items():
            np.testing.assert_array_equal(adapter.read_codes(path)[name], codes)

    def test_learned_codes_are_neighbours(self):
        """Learned rounding chooses between the two codes around a weight: nothing moves by a whole step or more."""
        _, nearest = prepared("layerwise")
        _, module = prepared("layerwise", rounding="learned", rounding_steps=60)
        differences = [
            np.abs(ours - theirs)
            for ours, theirs in zip(
                BrevitasAdapter().codes(module).values(), BrevitasAdapter().codes(nearest).values(), strict=True
            )
        ]
        assert max(map(np.max, differences)) == 1
        weight = nearest.conv1.weight.detach()
        scale = nearest.conv1.quant_weight().scale
        chosen = module.conv1.weight.detach() / scale
        inside = (weight / scale).abs() < 3  # others are clipped
        assert ((chosen - weight / scale).abs()[inside] <= 1 + 1e-4).all()

    def test_deep_copies_are_their_own(self):
        """Rounding in the finn profile leaves no forward method behind that would compute with another module."""
        import copy

        images = smooth_images()
        _, module = prepared("finn", rounding="gptq", rounding_steps=60)
        copied = copy.deepcopy(module)
        with torch.no_grad():
            copied.fc.bias.add_(100.0)
            assert (copied(images) - module(images)).min() > 99

    def test_bias_correction_sees_the_float_weights(self):
        """After learned rounding the classifier's bias is still corrected towards the float network's mean output."""
        model, images = network("residual"), smooth_images()
        options = {"rounding": "learned", "rounding_steps": 20, "batch_norm": "kept", "held_out": 0}
        module = BrevitasAdapter().prepare(model, uniform(model, images, "w2a8"), images, [images], **options)
        with torch.no_grad():
            torch.testing.assert_close(module(images).mean(0), model(images).mean(0), rtol=0, atol=1e-5)


class TestEqualization:
    @pytest.mark.parametrize("method", ["cross-layer", "smooth-quant"])
    def test_function_stays_and_ranges_move(self, method):
        """At 8 bits the equalized net computes the float model's function; the weights of its layers are others."""
        images = smooth_images()
        _, usual = prepared("finn", "w8a8")
        model, module = prepared("finn", "w8a8", equalization=method, held_out=0)
        with torch.no_grad():
            expected = model(images)
            assert (module(images) - expected).abs().max() < 0.1 * expected.abs().max()
        assert not torch.allclose(module.get_submodule("conv1").weight, usual.get_submodule("conv1").weight)

    @pytest.mark.parametrize("net", ["cnn", "residual"])
    @pytest.mark.parametrize("method", ["cross-layer", "smooth-quant"])
    def test_normalisation_follows_the_channels(self, method, net):
        """New statistics of an equalized net, each channel with its factor, leave the function of a well-normalised net."""
        model, images = network(net), smooth_images()
        reestimate_batch_norm(model, [images])
        bits = uniform(model, images, "w8a8")
        module = BrevitasAdapter("finn").prepare(model, bits, images, [images], equalization=method, bias_correction=False)
        with torch.no_grad():
            expected = model(images)
            assert (module(images) - expected).abs().max() < 0.05 * expected.abs().max()

    def test_a_changed_function_is_refused(self, monkeypatch):
        """Factors that do not cancel out are noticed on the float graph, before anything is quantized."""
        model, images = network("cnn"), smooth_images()

        class Broken:
            def __init__(self, **_options):
                pass

            def apply(self, graph):
                graph.get_submodule("fc").weight.data.mul_(1.5)

        monkeypatch.setattr(brevitas, "EqualizeGraph", Broken)
        with pytest.raises(AdapterError, match="changes what the traced graph computes"):
            BrevitasAdapter("finn").prepare(model, uniform(model, images), images, [images], equalization="cross-layer")

    def test_layerwise_has_none(self):
        """Without a graph nothing can be moved from layer to layer."""
        model, images = network("cnn"), smooth_images()
        with pytest.raises(AdapterError, match=r'moves factors through the traced graph.*profile="finn"'):
            BrevitasAdapter().prepare(model, uniform(model, images), images, [images], equalization="cross-layer")


class TestRefusals:
    def test_binary_weights(self):
        """Rounding methods need neighbouring codes."""
        model, example = network("binary"), CASES["binary"].example()
        with pytest.raises(AdapterError, match=r"binary weights of features\.0, features\.7"):
            BrevitasAdapter().prepare(model, mixed_bits("binary", model), example, [Batch(example)], rounding="learned")

    def test_transposed_convolutions(self):
        """Brevitas' greedy methods leave transposed convolutions out, which is told instead of done silently."""
        model, example = network("signal"), CASES["signal"].example()
        with pytest.raises(AdapterError, match=r"gptq leaves out transposed convolutions \(widen\)"):
            BrevitasAdapter().prepare(model, mixed_bits("signal", model), example, [example], rounding="gptq")

    def test_learned_rounding_takes_transposed_convolutions(self):
        """Learned rounding works on them, one-dimensional layers included."""
        model, example = network("signal"), CASES["signal"].example()
        options = {"rounding": "learned", "rounding_steps": 40}
        module = BrevitasAdapter().prepare(model, mixed_bits("signal", model), example, [example], **options, **PLAIN)
        nearest = BrevitasAdapter().prepare(model, mixed_bits("signal", model), example, [example], **PLAIN)
        with torch.no_grad():
            expected = model(example)
            assert (module(example) - expected).square().mean() < (nearest(example) - expected).square().mean()
