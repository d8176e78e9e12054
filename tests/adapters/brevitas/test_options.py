"""The adapter's own options, DuQ and power-of-two scales, and networks with hard-swish."""

import copy

import numpy as np
import pytest
import torch
from brevitas_nets import images, mixed_bits, network
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas.options import options_of
from mpq_brevitas.read import BrevitasGraph
from small_nets import mobilenet_v3
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify
from mpq_plugins.errors import AdapterError


class TestDuQ:
    @pytest.fixture
    def prepared(self):
        model, example, adapter = network("residual"), images(), BrevitasAdapter(quantizer="duq")
        bits = mixed_bits("residual", model)
        module = adapter.prepare(model, bits, example, [example])
        with torch.no_grad():  # let clip and output scale part, as training does
            for name, parameter in module.named_parameters():
                if name.endswith("duq.gamma"):
                    parameter.mul_(1.3)
        return model, adapter, bits, module, example

    def test_file_holds_bits_codes_and_outputs(self, prepared, tmp_path):
        """The exported file, folded to one scale per quantizer, has the module's bits, codes and outputs."""
        _, adapter, bits, module, example = prepared
        path = adapter.export(module, tmp_path / "m.onnx", example)
        report = verify(adapter, path, bits, module=module, inputs=example)
        assert report.check().outputs.ok
        assert all(check.n_codes for check in report.layers)
        assert any("duq" in name for name, _ in module.named_parameters())  # exporting folds a copy

    def test_checkpoint_remembers(self, prepared, tmp_path):
        """A checkpoint is rebuilt with DuQ, whatever the options of the adapter that loads it."""
        model, adapter, _, module, example = prepared
        loaded = BrevitasAdapter().load(model, adapter.save(module, tmp_path / "m.pt"), example)
        assert options_of(loaded).quantizer == "duq"
        assert torch.equal(loaded(example), module(example))

    def test_refusals(self):
        """What makes no sense with DuQ is refused with the reason."""
        with pytest.raises(AdapterError, match='quantizer="duq" needs profile="layerwise"'):
            BrevitasAdapter("finn", quantizer="duq")
        with pytest.raises(AdapterError, match="uniform, duq"):
            BrevitasAdapter(quantizer="lsq")
        model, example, adapter = network("cnn"), images(), BrevitasAdapter(quantizer="duq")
        for options in ({"rounding": "gptq"}, {"weight_range": "max"}, {"activation_range": "mse"}):
            with pytest.raises(AdapterError, match=f'"duq" does not take {next(iter(options))}='):
                adapter.prepare(model, mixed_bits("cnn", model), example, [example], **options)
        layer = find_layers(model, example)["fc"]
        assert "binary" in adapter.refuse(layer, Precision(1, 8))


class TestPowersOfTwo:
    @pytest.mark.parametrize("name", ["cnn", "residual"])
    def test_scales_in_the_file(self, name, tmp_path):
        """Every scale of the QONNX file is a single 2^n exactly, trained or not; bits, codes and outputs are the module's."""
        model, example, adapter = network(name), images(), BrevitasAdapter("finn", scales="power-of-two")
        bits = mixed_bits(name, model)
        module = adapter.prepare(model, bits, example, [example])
        trained = copy.deepcopy(module).train()
        optimizer = torch.optim.SGD(trained.parameters(), 0.1)
        trained(example).square().mean().backward()
        optimizer.step()
        for part in (module, trained.eval()):
            path = adapter.export(part, tmp_path / "m.onnx", example)
            graph = BrevitasGraph.load(path)
            scales = [graph.constant(node.input[1]) for node in graph.model.graph.node if node.op_type == "Quant"]
            assert len(scales) > len(bits.layers)
            for scale in scales:
                assert scale.size == 1
                assert np.log2(scale.astype(np.float64)) % 1 == 0
            verify(adapter, path, bits, module=part, inputs=example).check()

    def test_means_of_merged_normalisations_go_into_the_biases(self):
        """A scale per tensor cannot follow channels: weights stay, and each mean output is that of the float normalisation."""
        model, example, adapter = network("cnn"), images(), BrevitasAdapter("finn", scales="power-of-two")
        bits = mixed_bits("cnn", model)
        bits = BitConfig(dict.fromkeys(bits.layers, Precision(2, 8)), bits.fingerprint)
        kept, corrected = (
            adapter.prepare(model, bits, example, [example], batch_norm=choice, held_out=0) for choice in ("kept", "corrected")
        )
        name = "features.0"
        assert torch.equal(kept.get_submodule(name).weight, corrected.get_submodule(name).weight)
        with torch.no_grad():
            wanted = model.features[1](model.features[0](example)).mean((0, 2, 3))
        found = {}
        for module in (kept, corrected):
            layer = module.get_submodule(name)
            layer.register_forward_hook(lambda _module, _inputs, output, key=module: found.update({id(key): output}))
            with torch.no_grad():
                module(example)
        torch.testing.assert_close(found[id(corrected)].mean((0, 2, 3)), wanted, rtol=0, atol=1e-5)
        assert (found[id(kept)].mean((0, 2, 3)) - wanted).abs().max() > 1e-3

    def test_checkpoint_remembers(self, tmp_path):
        """A checkpoint is rebuilt with its kind of scales."""
        model, example, adapter = network("residual"), images(), BrevitasAdapter("finn", scales="power-of-two")
        module = adapter.prepare(model, mixed_bits("residual", model), example, [example])
        loaded = BrevitasAdapter().load(model, adapter.save(module, tmp_path / "m.pt"), example)
        assert options_of(loaded).scales == "power-of-two"
        assert torch.equal(loaded(example), module(example))

    def test_refusals(self):
        """They are for the finn profile, and no least-error step is a power of two."""
        with pytest.raises(AdapterError, match=r'Use it with profile="finn"'):
            BrevitasAdapter(scales="power-of-two")
        model, example, adapter = network("cnn"), images(), BrevitasAdapter("finn", scales="power-of-two")
        with pytest.raises(AdapterError, match="no powers of two"):
            adapter.prepare(model, mixed_bits("cnn", model), example, [example], activation_range="mse")


class TestHardSwish:
    def test_mobilenet_v3(self, tmp_path):
        """Prepared, trained for a step, exported and verified: every layer's bits and codes, and the outputs."""
        torch.manual_seed(0)
        model, example = mobilenet_v3(10).eval(), torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(2))
        adapter, inventory = BrevitasAdapter(), find_layers(model, example)
        bits = BitConfig({layer.name: Precision(4, 8) for layer in inventory}, inventory.fingerprint)
        module = adapter.prepare(model, bits, example, [example]).train()
        optimizer = torch.optim.SGD(module.parameters(), 1e-3)
        module(example).square().mean().backward()
        optimizer.step()
        path = adapter.export(module.eval(), tmp_path / "m.onnx", example)
        verify(adapter, path, bits, module=module, inputs=example).check()
        with pytest.raises(AdapterError, match=r"FINN has no hardware for stem.act \(hardswish\)"):
            BrevitasAdapter("finn").prepare(model, bits, example, [example])


@pytest.mark.parametrize(
    ("prepared_with", "asked", "texts"),
    [
        ({}, {"profile": "finn"}, ['profile="finn"', 'profile="layerwise"']),
        ({"profile": "finn"}, {"profile": "finn", "scales": "power-of-two"}, ['scales="power-of-two"', 'scales="float"']),
        ({}, {"quantizer": "duq"}, ['quantizer="duq"', 'quantizer="uniform"']),
        ({"profile": "finn"}, {}, []),
    ],
)
def test_options_that_a_checkpoint_was_not_prepared_with_are_refused(tmp_path, prepared_with, asked, texts):
    """What was asked for and what the file holds are both told; without options the file's own count."""
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    inventory = find_layers(model, x)
    bits = BitConfig({layer.name: Precision(4, 4) for layer in inventory}, inventory.fingerprint)
    maker = BrevitasAdapter(**prepared_with)
    path = maker.save(maker.prepare(model, bits, x, [x]), tmp_path / "module.pt")
    if not texts:
        assert torch.equal(BrevitasAdapter(**asked).load(model, path, x)(x), maker.load(model, path, x)(x))
        return
    with pytest.raises(AdapterError) as error:
        BrevitasAdapter(**asked).load(model, path, x)
    assert all(text in str(error.value) for text in texts)
