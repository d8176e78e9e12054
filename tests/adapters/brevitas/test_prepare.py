"""Preparing, training, copying, saving and refusing."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from brevitas_nets import ALL_PROFILES, CASES, Cnn, Residual, images, mixed_bits, network
from mpq_brevitas import BrevitasAdapter, internals
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.errors import (
    AdapterError,
    FingerprintError,
    FormatError,
    MissingExtraError,
)

EVERY = [
    (name, profile) for name in CASES for profile in ("layerwise", "finn") if profile == "layerwise" or name in ALL_PROFILES
]


def uniform(model, example, precision="w4a4"):
    inventory = find_layers(model, example)
    return BitConfig(dict.fromkeys((layer.name for layer in inventory), Precision.parse(precision)), inventory.fingerprint)


def test_import_is_cheap():
    """Importing the adapter loads neither Brevitas nor ONNX."""
    code = "import sys, mpq_brevitas; assert not {'brevitas', 'onnx', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


class TestModule:
    @pytest.mark.parametrize(("name", "profile"), EVERY)
    def test_reload_is_exact(self, prepared, tmp_path, name, profile):
        """A checkpoint, read with weights_only, gives back the module bit by bit: outputs, bits and shared scales."""
        case = prepared(name, profile)
        path = case.adapter.save(case.module, tmp_path / "module.pt")
        loaded = case.adapter.load(case.model, path, case.example)
        for ours, again in zip(case.outputs(), case.outputs(loaded), strict=True):
            np.testing.assert_array_equal(again, ours)
        exported = case.adapter.export(loaded, tmp_path / "m.onnx", case.example)
        assert case.adapter.read_bits(exported) == case.bits

    def test_reloaded_adds_still_share_their_scale(self, prepared, tmp_path):
        """After reloading, changing one quantizer's scale changes the one it is aligned with."""
        from mpq_brevitas.groups import activation_groups_of_graph

        case = prepared("residual", "finn")
        loaded = case.adapter.load(case.model, case.adapter.save(case.module, tmp_path / "m.pt"), case.example)
        assert activation_groups_of_graph(loaded) == activation_groups_of_graph(case.module)
        assert any(len(group.quantizers) > 1 for group in activation_groups_of_graph(loaded))

    @pytest.mark.parametrize(("name", "profile"), [("cnn", "layerwise"), ("residual", "finn"), ("odd", "layerwise")])
    def test_training(self, prepared, tmp_path, name, profile):
        """A deep copy trains: the loss falls, weights and learned scales move, and the trained bits export as asked."""
        case = prepared(name, profile)
        module = copy.deepcopy(case.module).train()
        target = [torch.zeros_like(torch.from_numpy(output)) for output in case.outputs()]
        optimizer = torch.optim.SGD(module.parameters(), 0.02)
        losses = []
        for _ in range(4):
            outputs = module(case.example)
            outputs = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
            loss = sum((ours - wanted).square().mean() for ours, wanted in zip(outputs, target, strict=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        before, after = case.module.state_dict(), module.state_dict()
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert any(key.endswith("weight_quant.tensor_quant.scaling_impl.value") for key in moved)
        path = case.adapter.export(module.eval(), tmp_path / "m.onnx", case.example)
        assert case.adapter.read_bits(path) == case.bits
        for layer, codes in case.adapter.codes(module).items():
            np.testing.assert_array_equal(case.adapter.read_codes(path)[layer], codes)
        np.testing.assert_array_equal(case.outputs()[0], prepared(name, profile).outputs()[0])

    def test_shared_and_tied(self, prepared):
        """A module under two names stays one module; tied weights stay one parameter."""
        module = prepared("odd").module
        assert module.again is module.same
        assert module.tied.weight is module.mix.weight

    @pytest.mark.parametrize("profile", ["layerwise", "finn"])
    def test_the_model_is_left_alone(self, profile):
        """The float model keeps its classes, tensors, mode and gradients; the random state is untouched."""
        model, example = network("residual").train(), images()
        bits = mixed_bits("residual", model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        BrevitasAdapter(profile).prepare(model, bits, example, [(example, None)])
        assert torch.equal(torch.rand(2), expected)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.training
        assert type(model.conv1) is nn.Conv2d

    def test_layers_outside_the_bits_stay_float(self):
        """A layer that the configuration leaves out keeps its class and its weights in the layerwise profile."""
        model, example = network("cnn"), images()
        bits = mixed_bits("cnn", model)
        bits = BitConfig({name: bits[name] for name in bits.layers if name != "fc"}, bits.fingerprint)
        module = BrevitasAdapter().prepare(model, bits, example, [example], bias_correction=False)
        assert type(module.fc) is nn.Linear
        assert torch.equal(module.fc.weight, model.fc.weight)

    def test_eight_bits_are_close_to_float(self):
        """At 8 bits without repair both profiles compute nearly what the float model computes: nothing is lost on the way."""
        model, example = network("residual"), images()
        bits = uniform(model, example, "w8a8")
        with torch.no_grad():
            expected = model(example)
            for profile in ("layerwise", "finn"):
                module = BrevitasAdapter(profile).prepare(
                    model, bits, example, [example], batch_norm="kept", bias_correction=False, weight_range="max"
                )
                assert (module(example) - expected).abs().max() < 0.05 * expected.abs().max()


class TestRepair:
    def test_merged_norms_are_reestimated(self):
        """Each merged channel gets the mean its normalisation promises, and the deviation |w| * sqrt(v / (v + eps))."""
        model, example = network("cnn"), images()
        bits = uniform(model, example, "w2a8")
        module = BrevitasAdapter("finn").prepare(model, bits, example, [example], batch_norm="re-estimated", held_out=0)
        found = []
        layer = module.get_submodule("features.7")
        handle = layer.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        module(example)
        handle.remove()
        channels = found[0].detach().transpose(0, 1).flatten(1)
        norm = model.features[8]
        torch.testing.assert_close(channels.mean(1), norm.bias, rtol=0, atol=1e-3)
        torch.testing.assert_close(channels.std(1), norm.weight.abs(), rtol=1e-2, atol=1e-4)

    def test_codes_survive_the_folding(self):
        """Folding new statistics into a channel changes no weight code."""
        model, example = network("cnn"), images()
        bits = uniform(model, example, "w3a8")
        adapter = BrevitasAdapter("finn")
        with_norms, without = (
            adapter.codes(adapter.prepare(model, bits, example, [example], batch_norm=choice))
            for choice in ("corrected", "kept")
        )
        for name in ("features.0", "features.4", "features.7"):
            np.testing.assert_array_equal(with_norms[name], without[name])

    def test_both_profiles_have_the_same_weight_codes(self):
        """Merging scales whole channels, so per-channel codes agree with the layerwise profile's up to a channel's sign."""
        model, example = network("cnn"), images()
        bits = uniform(model, example, "w4a8")
        ours, finns = (
            BrevitasAdapter(profile).codes(BrevitasAdapter(profile).prepare(model, bits, example, [example]))
            for profile in ("layerwise", "finn")
        )
        for name in ("features.0", "features.7"):
            agreement = np.mean(np.abs(ours[name]) == np.abs(finns[name]))
            assert agreement > 0.999, name

    def test_bias_correction(self):
        """The corrected classifier has the mean output of the float network on the same images."""
        model, example = network("cnn"), images()
        bits = uniform(model, example, "w2a8")
        plain, corrected = (
            BrevitasAdapter().prepare(model, bits, example, [example], bias_correction=choice, held_out=0)
            for choice in (False, True)
        )
        with torch.no_grad():
            wanted = model(example).mean(0)
            torch.testing.assert_close(corrected(example).mean(0), wanted, rtol=0, atol=1e-5)
            assert (plain(example).mean(0) - wanted).abs().max() > 1e-3


class Strange(nn.Conv2d):
    """A subclass that computes something else, which stays in float."""

    def forward(self, x):
        return 2 * super().forward(x)


class Untraceable(Cnn):
    """Control flow that depends on the data."""

    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


class TestRefusals:
    def test_one_bit_activations(self):
        """One-bit activations cannot even be written down."""
        with pytest.raises(ValueError, match="activation bits"):
            Precision(4, 1)

    def test_subclass(self):
        """A subclass that computes something else is named with the reason, not left in float."""
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Strange(4, 4, 3))
        inventory = find_layers(model, images())
        assert list(BrevitasAdapter().unconvertible(model, inventory, images())) == ["2"]
        with pytest.raises(AdapterError, match="2: Strange changes the result"):
            BrevitasAdapter().prepare(model, uniform(model, images()), images(), [images()])

    def test_parametrized(self):
        """A parametrized weight, whose stored tensor is not what is computed with, is named, and the rest is prepared."""
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
        inventory = find_layers(model, images())
        assert list(BrevitasAdapter().unconvertible(model, inventory)) == ["0"]
        bits = BitConfig({"1": Precision(4, 4)}, inventory.fingerprint)
        assert BrevitasAdapter().prepare(model, bits, images(), [images()])[1].weight_quant.bit_width() == 4

    def test_grouped_transposed(self):
        """Grouped transposed convolutions, which fail inside Brevitas, are refused before the search."""
        model, example = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, groups=2)), torch.randn(2, 8, 4, 4)
        layer = find_layers(model, example)["0"]
        assert "grouped transposed" in BrevitasAdapter().refuse(layer, Precision(4, 4))
        with pytest.raises(AdapterError, match="grouped transposed"):
            BrevitasAdapter().prepare(model, uniform(model, example), example, [example])

    def test_attention(self, prepared):
        """Projections inside MultiheadAttention are not offered as layers, so nothing there is left float silently."""
        case = prepared("attention")
        assert not any("attention" in name for name in case.bits.layers)

    def test_untraceable(self):
        """The finn profile says that the model cannot be traced and names the profile that can."""
        torch.manual_seed(0)
        model = Untraceable().eval()
        bits = uniform(model, images())
        with pytest.raises(AdapterError, match='profile="layerwise"'):
            BrevitasAdapter("finn").prepare(model, bits, images(), [images()])
        with pytest.raises(AdapterError, match='profile="layerwise"'):
            BrevitasAdapter("finn").activation_groups(model, images())
        from brevitas import config

        assert not config.IGNORE_MISSING_KEYS
        BrevitasAdapter().prepare(model, bits, images(), [images()])

    def test_unequal_activations_in_a_group(self):
        """Layers that share a quantizer must be asked for the same activation bits."""
        model = network("residual")
        bits = uniform(model, images())
        layers = {**bits.layers, "down": Precision(4, 5)}
        with pytest.raises(AdapterError, match="down: 5"):
            BrevitasAdapter("finn").prepare(model, BitConfig(layers, bits.fingerprint), images(), [images()])

    def test_tied_weights_with_different_bits(self):
        """One weight cannot have two widths."""
        model = network("odd")
        bits = mixed_bits("odd", model)
        layers = {**bits.layers, "tied": Precision(5, 8)}
        with pytest.raises(AdapterError, match="mix, tied hold the same weight"):
            BrevitasAdapter().prepare(model, BitConfig(layers, bits.fingerprint), images(), [images()])

    def test_unknown_options(self):
        """A wrong profile and a wrong weight range are refused with the ones there are."""
        with pytest.raises(AdapterError, match="layerwise, finn"):
            BrevitasAdapter("fpga")
        model = network("cnn")
        with pytest.raises(AdapterError, match="mse, max"):
            BrevitasAdapter().prepare(model, mixed_bits("cnn", model), images(), [images()], weight_range="best")

    def test_foreign_module(self, tmp_path):
        """A module that prepare() did not make is refused."""
        with pytest.raises(AdapterError, match="prepare"):
            BrevitasAdapter().export(network("cnn"), tmp_path / "m.onnx", images())

    def test_damaged_checkpoint(self, prepared, tmp_path):
        """A cut, a foreign and a missing checkpoint are refused."""
        case = prepared("cnn")
        path = case.adapter.save(case.module, tmp_path / "m.pt")
        path.write_bytes(path.read_bytes()[:2000])
        torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
        for name in ("m.pt", "other.pt", "none.pt"):
            with pytest.raises(FormatError):
                case.adapter.load(case.model, tmp_path / name, case.example)

    def test_checkpoints_of_others(self, prepared, tmp_path):
        """Another adapter's checkpoint, a file that is none and another model's are refused for what they are."""
        case = prepared("cnn")
        torch.save({"format": "mpq-module/1", "adapter": "nncf", "wiring": "{}"}, tmp_path / "theirs.pt")
        with pytest.raises(FormatError, match=r"of adapter 'nncf'.*Load it with the adapter that saved it"):
            case.adapter.load(case.model, tmp_path / "theirs.pt", case.example)
        (tmp_path / "text.pt").write_text("{}")
        with pytest.raises(FormatError, match="no checkpoint") as caught:
            case.adapter.load(case.model, tmp_path / "text.pt", case.example)
        assert "weights_only" not in str(caught.value)
        path = case.adapter.save(case.module, tmp_path / "m.pt")
        with pytest.raises(FingerprintError, match=r"m\.pt was prepared from another model"):
            case.adapter.load(network("residual"), path, images())

    def test_version(self, monkeypatch):
        """A Brevitas outside the known range, or none, is refused with what to install."""
        monkeypatch.setattr(internals.importlib.metadata, "version", lambda _name: "0.14.0")
        with pytest.raises(AdapterError, match=r"0\.14\.0 is installed.*>=0\.13,<0\.14"):
            internals.require_brevitas()

        def missing(_name):
            raise internals.importlib.metadata.PackageNotFoundError

        monkeypatch.setattr(internals.importlib.metadata, "version", missing)
        with pytest.raises(MissingExtraError, match=r"mpq-plugins\[brevitas\]"):
            internals.require_brevitas()


class TestGroups:
    def test_layerwise_has_none(self):
        """In the layerwise profile every layer has its own input quantizer."""
        assert BrevitasAdapter().activation_groups(Residual().eval(), images()) == ()

    def test_residual(self):
        """Layers that read one quantized block output are a group, known before any calibration."""
        groups = BrevitasAdapter("finn").activation_groups(network("residual"), images())
        assert groups == (("conv2", "down"),)
