"""Ranges, equalization and what NNCF lacks: the common vocabulary of post-training quantization."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpq_nncf import NNCFAdapter, nncf_quantizers
from mpq_nncf.wiring import wiring_of
from nncf_cases import calibration, make, mixed_bits
from nncf_nets import images
from torch import nn

from mpq_plugins import BitConfig, Precision, find_layers, verify
from mpq_plugins.adapter.base import bits_of
from mpq_plugins.errors import AdapterError, DataError
from mpq_plugins.quantizers.histogram import Histogram
from mpq_plugins.quantizers.uniform import mse_range

PLAIN = {"bias_correction": False, "batch_norm": "kept"}


class Depthwise(nn.Module):
    """Three layers whose inputs are signed, unsigned and unsigned per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 6, 3, 2), nn.Conv2d(6, 6, 3, groups=6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.stem(x)))
        return self.head(torch.relu(x).mean((2, 3)))


def uniform(model: nn.Module, example, precision: str) -> BitConfig:
    inventory = find_layers(model, example)
    return BitConfig({layer.name: Precision.parse(precision) for layer in inventory}, inventory.fingerprint)


def layer_inputs(model: nn.Module, data: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """What every layer of a float model reads, over all data."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _layer, inputs, name=name: seen.setdefault(name, []).append(inputs[0]))
        for name, layer in model.named_children()
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model, data = Depthwise().eval(), [images(24, seed=seed)[0] * (seed + 1) for seed in (0, 1)]
    return model, data, layer_inputs(model, data)


def scales(module: nn.Module) -> dict[str, torch.Tensor]:
    wiring = wiring_of(module)
    return {name: nncf_quantizers.quantizer_at(module, wiring[name].activation[0]).scale.detach().flatten() for name in wiring}


@pytest.mark.parametrize("precision", ["w8a4", "w8a8"])
def test_ranges_of_least_squared_error(adapter, case, precision):
    """Steps have the squared error of the core's own search, to two percent; one range for all channels from 7 bits on."""
    model, data, inputs = case
    module = adapter.prepare(model, uniform(model, data[0], precision), data[0], data, activation_range="mse", **PLAIN)
    bits = Precision.parse(precision).activation
    for name, scale in scales(module).items():
        signed = name == "stem"
        codes = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        assert len(scale) == (6 if name == "depthwise" else 1)
        if bits == 8:  # channels share a range where there are codes to spare
            assert len(set(scale.tolist())) == 1
            scale = scale[:1]
        rows = [inputs[name]] if len(scale) == 1 else list(inputs[name].unbind(1))

        def error(values, step, codes=codes):
            return float((values - torch.round(values / step).clamp(*codes) * step).square().sum())

        for values, threshold in zip(rows, scale, strict=True):
            best = mse_range(values, (bits,), signed=signed)[bits]
            assert error(values, threshold / codes[1]) <= 1.02 * error(values, best) + 1e-9


def test_ranges_of_largest_magnitude_and_percentile(adapter, case):
    """The largest magnitude is the data's own; the percentile is the 0.9999 quantile of all images."""
    model, data, inputs = case
    bits = uniform(model, data[0], "w8a4")
    largest = scales(adapter.prepare(model, bits, data[0], data, activation_range="max", **PLAIN))
    assert float(largest["stem"]) == pytest.approx(float(inputs["stem"].abs().max()), rel=1e-5)
    assert largest["depthwise"].tolist() == pytest.approx(inputs["depthwise"].amax((0, 2, 3)).tolist(), rel=1e-5)
    percentile = scales(adapter.prepare(model, bits, data[0], data, activation_range="percentile", **PLAIN))
    quantiles = np.quantile(torch.cat(list(data)).numpy(), (1e-4, 1 - 1e-4))
    assert float(percentile["stem"]) == pytest.approx(float(np.abs(quantiles).max()), rel=0.01)


def bins_of(histogram, row):
    """Centres and counts of the bins of a row that hold values."""
    width = 2 * histogram.limit[row] / histogram.n_bins
    centres = (torch.arange(histogram.n_bins) + 0.5) * width - histogram.limit[row]
    held = histogram.counts[row] > 0
    return centres[held], histogram.counts[row][held]


def test_histograms_grow_without_loss():
    """Batches of growing range give the counts, extremes and quantiles of numpy on all values together, per channel too."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, 3, 40, generator=generator) * spread for spread in (0.1, 1.0, 30.0)]
    together = torch.cat(batches)
    for n_channels in (1, 3):
        histogram = Histogram(n_channels)
        for batch in batches:
            histogram.add(batch)
        for row, values in enumerate([together] if n_channels == 1 else together.unbind(1)):
            centres, counts = bins_of(histogram, row)
            assert int(counts.sum()) == values.numel()
            assert (float(histogram.least[row]), float(histogram.most[row])) == (float(values.min()), float(values.max()))
            width = 2 * float(histogram.limit[row]) / histogram.n_bins
            assert float((centres * counts).sum()) == pytest.approx(float(values.sum()), abs=width / 2 * values.numel())
            expected = np.quantile(values.numpy(), 0.9, method="inverted_cdf")
            assert float(histogram.quantile(0.9)[row]) == pytest.approx(expected, abs=width)


def test_a_channel_that_is_always_zero_is_counted():
    """Beside one with values it keeps its zeros in the bins around zero; pretrained networks have such channels."""
    histogram = Histogram(2)
    values = torch.rand(4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    values[:, 1] = 0
    for _ in range(2):
        histogram.add(values)
    assert histogram.counts.sum(1).tolist() == [200, 200]
    assert float(histogram.quantile(0.9)[1]) == 0
    assert int(histogram.counts[1].argmax()) in (histogram.n_bins // 2 - 1, histogram.n_bins // 2)


def test_asymmetric_ranges(case):
    """A range of least squared error with a zero point serves one-sided values better than the full symmetric one does."""
    adapter = NNCFAdapter(asymmetric=True)
    model, data, inputs = case
    module = adapter.prepare(model, uniform(model, data[0], "w8a3"), data[0], data, activation_range="mse", **PLAIN)
    for name, layer in wiring_of(module).items():
        quantizer, values = nncf_quantizers.quantizer_at(module, layer.activation[0]), inputs[name]
        with torch.no_grad():
            found = float((quantizer(values) - values).square().sum())
            quantizer.input_low.copy_(values.amin().expand_as(quantizer.input_low).clamp(max=0))
            quantizer.input_range.copy_((values.amax() - values.amin().clamp(max=0)).expand_as(quantizer.input_range))
            assert found < float((quantizer(values) - values).square().sum())


def test_what_nncf_lacks_is_refused(adapter, case):
    """Rounding other than to nearest, cross-layer equalization and unknown options name what to use instead."""
    model, data, _ = case
    bits = uniform(model, data[0], "w4a8")
    for rounding in ("gptq", "gpfq", "qronos", "learned"):
        with pytest.raises(AdapterError, match=f"no rounding='{rounding}'.*Brevitas"):
            adapter.prepare(model, bits, data[0], data, rounding=rounding)
    with pytest.raises(AdapterError, match=r"channel alignment.*Brevitas"):
        adapter.prepare(model, bits, data[0], data, equalization="cross-layer")
    with pytest.raises(AdapterError, match="no option 'percentiles'"):
        adapter.prepare(model, bits, data[0], data, percentiles=3)
    convolutions = replace(bits, layers={"stem": Precision(4, 8), "depthwise": Precision(4, 8)})
    with pytest.raises(AdapterError, match="linear layers only"):
        adapter.prepare(model, convolutions, data[0], data, equalization="smooth-quant")


@pytest.mark.parametrize("net", ["attention", "residual"])
def test_smooth_quant_keeps_the_function_and_the_round_trip(adapter, net, tmp_path):
    """Without quantizers the smoothed module is the float model; with them every format holds its bits, codes and outputs."""
    case = make(net, adapter, equalization="smooth-quant", batch_norm="kept", bias_correction=False, held_out=0)
    assert any("_scale_value" in name for name in case.module.state_dict())
    inputs = images(8, seed=5)[0]
    for format in adapter.formats:
        path = adapter.export(case.module, tmp_path / format, case.example, format=format)
        assert verify(adapter, path, case.bits, module=case.module, inputs=inputs).check().ok
    loaded = adapter.load(case.model, adapter.save(case.module, tmp_path / "module.pt"), case.example)
    float_module = copy.deepcopy(case.module)
    for hook in nncf_quantizers.hooks(float_module):
        nncf_quantizers.pass_through(nncf_quantizers.quantizer_at(float_module, hook.name), on=True)
    with torch.no_grad():
        assert torch.equal(loaded(inputs), case.module(inputs))
        torch.testing.assert_close(float_module(inputs), case.model(inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_arithmetic_per_column_in_front_of_a_quantizer(adapter, norm, tmp_path):
    """Normalised features reach the next layer's quantizer as torch computes them, by default and exactly, at any width."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(16), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[2].weight.copy_(torch.randn(16).exp())
        model[2].bias.copy_(torch.randn(16))
    inputs = torch.randn(32, 16, 2, 2)
    for precision in ("w8a3", "w8a8"):
        bits = uniform(model, inputs, precision)
        module = adapter.prepare(model, bits, inputs, [inputs])
        path = adapter.export(module, tmp_path / precision, inputs)
        assert verify(adapter, path, bits, module=module, inputs=inputs).check().ok
        with torch.no_grad():
            expected = module(inputs).numpy()
        assert np.abs(adapter.run(path, inputs, exact=False)[0] - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_switched_bits_equal_prepared_ones(asymmetric, case, tmp_path):
    """From w8a8 to w4a4: the codes and weight ranges of a module prepared there, activation ranges to 5 %; files follow."""
    adapter = NNCFAdapter(asymmetric=asymmetric)
    model, data, _ = case
    narrow, wide = (uniform(model, data[0], precision) for precision in ("w4a4", "w8a8"))
    module, fresh = (adapter.prepare(model, bits, data[0], data, **PLAIN) for bits in (wide, narrow))
    parameters = {name: id(parameter) for name, parameter in module.named_parameters()}
    module.train()
    assert adapter.set_bits(module, narrow, data) is module
    assert module.training
    module.eval()
    assert bits_of(module) == narrow
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == parameters
    ours, theirs = adapter.codes(module), adapter.codes(fresh)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    fitted = fresh.state_dict()
    for name, value in module.state_dict().items():
        if "hooks" in name:
            room = 0.05 * float(fitted[name].abs().max()) if value.is_floating_point() else 0
            torch.testing.assert_close(value, fitted[name], rtol=0.05, atol=room)
    loaded = adapter.load(model, adapter.save(module, tmp_path / "module.pt"), data[0])
    with torch.no_grad():
        assert torch.equal(loaded(data[1]), module(data[1]))
    for switched in (module, loaded):
        path = adapter.export(switched, tmp_path / "m", data[0])
        assert verify(adapter, path, narrow, module=module, inputs=data[0]).check().ok


def test_switching_leaves_what_keeps_its_width(adapter, case):
    """Only changed widths get new ranges, without batches no activation does; a loaded module remembers its method."""
    model, data, _ = case
    bits = uniform(model, data[0], "w4a4")
    module = adapter.prepare(model, bits, data[0], data, **PLAIN)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_scale_param_storage"):
                parameter.mul_(1.25)  # as if learned
    before = {name: value.clone() for name, value in module.state_dict().items() if name.endswith("scale")}
    changed = replace(bits, layers={**bits.layers, "depthwise": Precision(3, 4), "head": Precision(4, 3)})
    adapter.set_bits(module, changed)
    after = module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(moved) == 1
    assert "depthwise/conv2d/0__1" in moved.pop()
    other = replace(bits, layers={**changed.layers, "head": Precision(4, 6)})
    adapter.set_bits(module, other, [data[0]])
    moved = {name for name in before if not torch.equal(after[name], module.state_dict()[name])}
    assert not moved  # state_dict() shares memory with the module
    assert len([name for name in before if not torch.equal(before[name], after[name])]) == 2


def test_unusable_batches_are_told(adapter, case):
    """NaN among the batches that ranges are fitted to is a DataError, and nothing is switched."""
    model, data, _ = case
    bits = uniform(model, data[0], "w8a8")
    module = adapter.prepare(model, bits, data[0], data, **PLAIN)
    with pytest.raises(DataError, match="NaN or infinity"):
        adapter.set_bits(module, uniform(model, data[0], "w4a4"), [torch.full_like(data[0], torch.nan)])
    assert bits_of(module) == bits
    assert int(adapter.codes(module)["head"].max()) > 7


def test_tied_weights_cannot_part(adapter, prepared):
    """Layers with one weight must be switched together."""
    case = copy.copy(prepared("zoo"))
    bits = dict(mixed_bits(case.model, case.example, adapter).layers)
    bits["tied_b"] = Precision(bits["tied_a"].weight % 7 + 2, bits["tied_b"].activation)
    with pytest.raises(AdapterError, match=r"hold the same weight.*Tie them"):
        adapter.set_bits(case.module, replace(case.bits, layers=bits), calibration())


def test_older_checkpoints_load(adapter, case, tmp_path):
    """A checkpoint without the record of options loads, and its bits can be switched by the defaults."""
    model, data, _ = case
    narrow = uniform(model, data[0], "w4a4")
    module = adapter.prepare(model, uniform(model, data[0], "w8a8"), data[0], data, **PLAIN)
    document = torch.load(adapter.save(module, tmp_path / "module.pt"), weights_only=True)
    assert document.pop("ptq")
    torch.save(document, tmp_path / "older.pt")
    loaded = adapter.set_bits(adapter.load(model, tmp_path / "older.pt", data[0]), narrow)
    ours, theirs = adapter.codes(loaded), adapter.codes(adapter.set_bits(module, narrow))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_channels_of_zeros_and_late_extremes_are_counted():
    """A dead channel beside a living one, and values a thousand times those of the first batch, are all counted."""
    histogram = Histogram(2)
    for spread in (1.0, 1000.0):
        values = torch.linspace(-1, 1, 11) * spread
        histogram.add(torch.stack([torch.zeros(11), values])[None])
    assert histogram.counts.sum(1).tolist() == [22, 22]
    assert float(bins_of(histogram, 0)[0].abs().max()) < 1e-20


def test_the_error_of_a_histogram_is_that_of_its_values():
    """Signed and unsigned, with and without zero point: against the definition on all values, to the width of a bin."""
    values = torch.randn(2, 3, 4000, generator=torch.Generator().manual_seed(0))
    histogram = Histogram(3)
    histogram.add(values)
    lows, highs = torch.tensor([[-1.0, -2.0, 0.0]]).expand(3, 3), torch.tensor([[1.5, 2.5, 3.0]]).expand(3, 3)
    for n_levels in (4, 16, 256):
        found = histogram.squared_error(lows, highs, n_levels) * histogram.limit[:, None].double().square()
        for row in range(3):
            for column in range(3):
                step = (highs[row, column] - lows[row, column]) / (n_levels - 1)
                zero = torch.round(-lows[row, column] / step)
                codes = (torch.round(values[:, row] / step) + zero).clamp(0, n_levels - 1)
                expected = float((values[:, row] - (codes - zero) * step).square().sum())
                assert float(found[row, column]) == pytest.approx(expected, rel=0.02)
