"""DuQ through Brevitas: the reference's numbers, Brevitas' calibration, and the exported file read back."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas import internals as brevitas
from mpq_brevitas.duq import DuQTensorQuant, activation_quantizer, fold_duq, weight_quantizer
from mpq_brevitas.options import BrevitasOptions
from mpq_brevitas.ranges import calibrate
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers
from mpq_plugins.adapter.base import attach_bits, bits_of
from mpq_plugins.adapter.record import record
from mpq_plugins.model.run import Batch
from mpq_plugins.training import duq, parameter_groups

BITS = {"0": Precision(3, 8), "3": Precision(4, 5), "7": Precision(2, 3)}


def _float_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1, groups=2),
        nn.Hardswish(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.fixture
def net(images):
    """A net whose layers Brevitas quantizes by DuQ, calibrated; the middle one reads unsigned values."""
    module, example = _float_net().eval(), images
    bits = BitConfig(BITS, find_layers(module, example).fingerprint)
    signed = {"0": True, "3": False, "7": True}
    duq = BrevitasOptions(quantizer="duq")
    options = {
        "weight_quant": lambda _, name: weight_quantizer(bits[name].weight, duq),
        "input_quant": lambda _, name: activation_quantizer(bits[name].activation, duq, signed=signed[name]),
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    with brevitas.guarded():
        layers = {kind: (quantized, options) for kind, quantized in brevitas.QUANTIZED.items()}
        module = brevitas.layerwise_quantize(copy.deepcopy(module), compute_layer_map=layers)
    calibrate(module, [Batch(images[:8]), Batch(images[8:])])
    record(module, options=BrevitasOptions("layerwise", "max", signed))
    return attach_bits(module, bits)


def _learned(module):
    """Let a and c of every quantizer part, as training does."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for quantizer in module.modules():
            if isinstance(quantizer, DuQTensorQuant):
                quantizer.duq.alpha.add_(0.3 * torch.randn((), generator=generator))
                quantizer.duq.gamma.add_(0.3 * torch.randn((), generator=generator))
    return module


def test_weights_and_activations_have_the_numbers_of_the_reference(net, images):
    """Quantized tensors are those of `duq`; Brevitas' scale is c / q, and its codes times scale are the values."""
    layer = _learned(net)[0]
    weight = layer.weight_quant.tensor_quant.duq
    quantized = layer.quant_weight()
    assert torch.equal(quantized.value, duq(layer.weight, weight.a, weight.c, bits=3, signed=True))
    torch.testing.assert_close(quantized.int() * quantized.scale, quantized.value)
    assert quantized.scale.item() == pytest.approx(weight.c.item() / 3)
    activation = layer.input_quant.fused_activation_quant_proxy.tensor_quant.duq
    assert torch.equal(layer.input_quant(images).value, duq(images, activation.a, activation.c, bits=8, signed=True))


def test_calibration_starts_the_ranges(net, images):
    """Weights start at 0.9 of the largest magnitude, activations at the mean over batches of the 95th percentile."""
    weight = net[0].weight_quant.tensor_quant.duq
    assert weight.a.item() == weight.c.item() == pytest.approx(0.9 * net[0].weight.abs().max().item())
    activation = net[0].input_quant.fused_activation_quant_proxy.tensor_quant.duq
    batches = (images[:8].abs().numpy().ravel(), images[8:].abs().numpy().ravel())
    expected = np.mean([np.quantile(batch, 0.95, method="inverted_cdf") for batch in batches])
    assert activation.a.item() == pytest.approx(expected, rel=1e-5)


def test_every_range_learns(net, images, labels):
    """All a and c are in the group of ranges, and a backward pass reaches them."""
    groups = parameter_groups(net, learning_rate=0.1, weight_decay=0.0)
    ranges = next(group["params"] for group in groups if group["name"] == "ranges")
    assert len(ranges) == 2 * 2 * len(BITS)
    F.cross_entropy(net.train()(images), labels).backward()
    assert all(parameter.grad is not None for parameter in ranges)


def test_bits_switch_in_place_and_are_saved(net, images):
    """`set_bits` gives the codes of the new width; the width is in the state dict and survives reloading."""
    other = copy.deepcopy(net)
    bits = bits_of(net)
    BrevitasAdapter().set_bits(net, BitConfig({**bits.layers, "0": Precision(8, 4)}, bits.fingerprint))
    assert int(net[0].quant_weight().int().abs().max()) > 100
    assert len(net[0].input_quant(images).value.unique()) <= 15
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images), net(images))


def test_folded_and_exported_file_holds_bits_codes_and_outputs(net, images, tmp_path):
    """A net with a != c becomes ordinary quantizers: the same outputs, and QONNX with the same bits, codes and outputs."""
    adapter = BrevitasAdapter()
    trained = _learned(net).eval()
    outputs, codes = trained(images).detach(), adapter.codes(trained)
    folded = fold_duq(copy.deepcopy(trained)).eval()
    torch.testing.assert_close(folded(images), outputs, rtol=1e-5, atol=1e-5)
    path = adapter.export(
        record(attach_bits(folded, BitConfig(BITS, "sha256:0")), options=BrevitasOptions("layerwise", "max")),
        tmp_path / "net.onnx",
        images,
    )
    assert adapter.read_bits(path).layers == BITS
    for name, own in adapter.read_codes(path).items():
        assert np.array_equal(own, codes[name])
    (exported,) = adapter.run(path, images[:1])
    torch.testing.assert_close(torch.tensor(exported), outputs[:1], rtol=1e-4, atol=1e-5)


def test_exported_unfolded_its_one_scale_would_be_wrong(net, images):
    """Why folding is needed: the codes of x / (c / q) are others than those of x / (a / q) as soon as a and c part."""
    quantizer = _learned(net)[0].weight_quant.tensor_quant.duq
    weight, q = net[0].weight, 3
    by_scale = torch.round(weight / (quantizer.c / q)).clamp(-q, q)
    assert not torch.equal(by_scale.int(), net[0].quant_weight().int().int())
