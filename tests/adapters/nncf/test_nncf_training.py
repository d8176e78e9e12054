"""Training a prepared module: gradients of ranges, odd scales, float weights, switched bits, copies, data parallelism."""

from __future__ import annotations

import copy
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mpq_nncf import NNCFAdapter, nncf_quantizers
from mpq_nncf.wiring import wiring_of
from nncf_nets import images
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify


class Tiny(nn.Module):
    """A convolution, a depthwise one, a norm and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, 2, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.head = nn.Conv2d(6, 6, 3, groups=6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.depthwise(F.relu(self.norm(self.stem(x))))
        return self.head(F.hardswish(x).mean((2, 3)))


EXAMPLE = images(4, seed=3)[0]


def bits_for(model: nn.Module, precision: str) -> BitConfig:
    inventory = find_layers(model, EXAMPLE)
    return BitConfig({layer.name: Precision.parse(precision) for layer in inventory}, inventory.fingerprint)


def prepared_tiny(adapter: NNCFAdapter, precision: str = "w3a4") -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Tiny().eval()
    return model, adapter.prepare(model, bits_for(model, precision), EXAMPLE, [images(32, seed=10)])


def steps(module: nn.Module, n: int, *, rate: float = 0.05) -> None:
    data, labels = images(64, seed=1)
    optimizer = torch.optim.SGD((p for p in module.parameters() if p.requires_grad), rate, momentum=0.9)
    module.train()
    for _ in range(n):
        optimizer.zero_grad()
        F.cross_entropy(module(data), labels).backward()
        optimizer.step()
    module.eval()


def ranges(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if "hooks" in name and parameter.requires_grad}


@pytest.mark.parametrize("asymmetric", [False, True])
def test_ranges_learn_and_files_hold_the_result(asymmetric, tmp_path):
    """Every range gets a gradient and moves, no width narrows, and both runtimes' files hold the trained codes and outputs."""
    adapter = NNCFAdapter(asymmetric=asymmetric)
    model, module = prepared_tiny(adapter)
    before = {name: value.detach().clone() for name, value in ranges(module).items()}
    assert len(before) == (9 if asymmetric else 6)
    steps(module, 3)
    assert all(value.grad is not None and not torch.equal(value, before[name]) for name, value in ranges(module).items())
    quantizers = [nncf_quantizers.quantizer_at(module, hook) for layer in wiring_of(module).values() for hook in layer.weight]
    assert {(quantizer.level_low, quantizer.level_high) for quantizer in quantizers} == {(-4, 3)}
    for format in ("openvino-compact", "onnx"):
        path = adapter.export(module, tmp_path / format, EXAMPLE, format=format)
        assert verify(adapter, path, bits_for(model, "w3a4"), module=module, inputs=images(16, seed=5)[0]).check().ok


def test_negative_and_vanished_scales(adapter, tmp_path):
    """A scale that training drove below or to zero works by its magnitude, in torch, in the codes and in both files alike."""
    model, module = prepared_tiny(adapter, "w4a8")
    expected = adapter.codes(module)
    places = wiring_of(module)
    for name in ("stem", "depthwise"):
        nncf_quantizers.quantizer_at(module, places[name].weight[0]).scale.data[0].neg_()
    nncf_quantizers.quantizer_at(module, places["head"].activation[0]).scale.data.neg_()
    codes = adapter.codes(module)
    assert all(np.array_equal(codes[name], expected[name]) for name in codes)
    nncf_quantizers.quantizer_at(module, places["stem"].weight[0]).scale.data[1] = 0
    with torch.no_grad():
        assert module(EXAMPLE).isfinite().all()
    for format in ("openvino-compact", "onnx"):
        path = adapter.export(module, tmp_path / format, EXAMPLE, format=format)
        assert verify(adapter, path, bits_for(model, "w4a8"), module=module, inputs=EXAMPLE).check().ok


def test_ranges_follow_float_weights(adapter):
    """Weights that doubled while they were left in float get the codes that they had."""
    _, module = prepared_tiny(adapter, "w3a8")
    codes = adapter.codes(module)
    adapter.use_float_weights(module)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.weight.mul_(2)
    found = adapter.codes(adapter.use_float_weights(module, False))
    for name, expected in codes.items():
        np.testing.assert_array_equal(found[name], expected)


def test_float_weights_and_back(adapter, tmp_path):
    """Without weight quantizers the weights are the parameters, in training too; state, codes and files show nothing of it."""
    model, module = prepared_tiny(adapter, "w2a8")
    parameters, state = dict(module.named_parameters()), {k: v.clone() for k, v in module.state_dict().items()}
    codes = adapter.codes(module)
    assert adapter.use_float_weights(module) is module
    reference = adapter.prepare(model, bits_for(model, "w8a8"), EXAMPLE, [images(32, seed=10)])
    reference.load_state_dict({k: v for k, v in state.items() if "__1.0" not in k}, strict=False)
    with torch.no_grad():
        near = float((module(EXAMPLE) - reference(EXAMPLE)).abs().mean())
        quantized = adapter.use_float_weights(copy.deepcopy(module), False)(EXAMPLE)
        assert near < 0.05 * float((module(EXAMPLE) - quantized).abs().mean())
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(np.array_equal(found, codes[name]) for name, found in adapter.codes(module).items())
    loaded = adapter.load(model, adapter.save(module, tmp_path / "m.pt"), EXAMPLE)
    with torch.no_grad():
        assert torch.equal(loaded(EXAMPLE), quantized)
    path = adapter.export(module, tmp_path / "m", EXAMPLE)
    assert verify(adapter, path, bits_for(model, "w2a8"), module=loaded, inputs=EXAMPLE).check().ok
    steps(module, 1)
    weight_ranges = [name for name in ranges(module) if "__1.0" in name]
    assert len(weight_ranges) == 3
    assert all(
        torch.equal(
            module.state_dict()[name.replace("_scale_param_storage", "scale")],
            state[name.replace("_scale_param_storage", "scale")],
        )
        for name in weight_ranges
    )
    adapter.use_float_weights(module, False)
    assert dict(module.named_parameters()).keys() == parameters.keys()
    assert all(value is parameters[name] for name, value in module.named_parameters())
    steps(module, 1)
    assert all(value.grad is not None for value in ranges(module).values())


def test_lowered_bits_train_on(adapter, tmp_path):
    """Bits lowered between steps of one optimizer: the same parameters learn on, and the file holds the lower bits."""
    model, module = prepared_tiny(adapter, "w8a8")
    steps(module, 1)
    parameters = dict(module.named_parameters())
    adapter.set_bits(module, bits_for(model, "w3a3"), [images(32, seed=10)])
    assert all(value is parameters[name] for name, value in module.named_parameters())
    steps(module, 2)
    path = adapter.export(module, tmp_path / "m", EXAMPLE)
    assert verify(adapter, path, bits_for(model, "w3a3"), module=module, inputs=EXAMPLE).check().ok


def test_copies_and_data_parallel(adapter, tmp_path):
    """One step under DistributedDataParallel (gloo, one process) changes the module as the same step on a copy without it."""
    _, module = prepared_tiny(adapter)
    alone = copy.deepcopy(module)
    store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        steps(nn.parallel.DistributedDataParallel(module), 2)
    finally:
        torch.distributed.destroy_process_group()
    steps(alone, 2)
    assert all(torch.equal(value, alone.state_dict()[name]) for name, value in module.state_dict().items())
