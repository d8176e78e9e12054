"""Whole models with negative padding: what is rewritten, what stays, and that the function does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_nets import mobilenet_v3
from torch import nn

from mpq_plugins import find_layers
from mpq_plugins.training import negatively_padded, with_negative_padding


class Net(nn.Module):
    """Hard swishes read by a convolution with norm, one with a bias, one with neither, an add, and a linear layer."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.stem, self.s1 = nn.Conv2d(3, 6, 3, bias=False), nn.Hardswish(inplace=True)
        self.a, self.norm, self.s2 = (
            nn.Conv2d(6, 6, 3, padding=padding, groups=3, bias=False),
            nn.BatchNorm2d(6),
            nn.Hardswish(),
        )
        self.b, self.s3 = nn.Conv2d(6, 8, 3, 2, padding), nn.Hardswish()
        self.c, self.s4 = nn.Conv2d(8, 8, 1, bias=False), nn.Hardswish()
        self.gate = nn.Linear(8, 8)
        self.s5, self.head = nn.Hardswish(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.s2(self.norm(self.a(self.s1(self.stem(x)))))
        x = self.s4(self.c(self.s3(self.b(x))))
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = (x * torch.sigmoid(self.gate(pooled))[:, :, None, None]).mean((2, 3))
        return self.head(self.s5(x))


def net(padding: int) -> Net:
    torch.manual_seed(0)
    model = Net(padding).eval()
    nn.init.normal_(model.norm.running_mean)
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    return model


def image(seed: int = 1) -> torch.Tensor:
    return 3 * torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(seed))


def test_the_function_stays_without_padding():
    """With no padded border outputs are equal to 1e-5; the layer read by a product keeps its hard swish, with the reason."""
    model = net(padding=0)
    padded = with_negative_padding(model, image())
    assert padded.rewritten == ("s1", "s2", "s3", "s5")
    assert dict(padded.kept) == {"s4": "read by mul"}
    torch.testing.assert_close(padded.model(image(2)), model(image(2)), rtol=0, atol=1e-5)


def test_borders_are_the_explicit_ones():
    """Where convolutions pad, the result is that of padding the hard swish with -3/8, and differs from padding with 0."""
    model = net(padding=1)
    padded = with_negative_padding(model, image()).model
    x = image(2)
    with torch.no_grad():
        first = negatively_padded(model.a, F.hardswish(model.stem(x)), model.a.weight)
        second = negatively_padded(model.b, F.hardswish(model.norm(first)), model.b.weight)
        ours = padded.b(padded.s2(padded.norm(padded.a(padded.s1(padded.stem(x))))))
        plain = model.b(model.s2(model.norm(model.a(model.s1(model.stem(x))))))
    torch.testing.assert_close(ours, second, rtol=0, atol=1e-5)
    assert float((ours - plain).abs().max()) > 1e-2
    torch.testing.assert_close(ours[:, :, 1:-1, 1:-1], plain[:, :, 1:-1, 1:-1], rtol=0, atol=1e-5)


def test_names_shapes_and_the_given_model_stay():
    """The fingerprint is the model's, no parameter is new except the bias of a layer without bias and norm, modes stay."""
    model = net(padding=1)
    model.norm.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    padded = with_negative_padding(model, image())
    assert find_layers(padded.model, image()).fingerprint == find_layers(model, image()).fingerprint
    assert set(padded.model.state_dict()) - set(before) == {"c.bias"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in padded.model.modules()] == [m.training for m in model.modules()]
    changed = {name for name, value in before.items() if not torch.equal(value, padded.model.state_dict()[name])}
    assert changed == {"norm.running_mean", "b.bias", "head.bias"}


def test_what_has_other_readers_stays():
    """A hard swish in a concatenation, at the output, called twice or read by a twice called layer is not rewritten."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joined, self.twice, self.last, self.unused, self.before = (nn.Hardswish() for _ in range(5))
            self.a, self.shared = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            x = torch.cat([self.joined(self.a(x)), x], 1)[:, :3]
            x = self.shared(self.twice(self.twice(x)))
            return self.last(self.shared(self.before(x)))

    padded = with_negative_padding(Odd(), image())
    assert padded.rewritten == ()
    assert dict(padded.kept) == {
        "joined": "read by cat",
        "twice": "called 2 times on this example",
        "last": "read by the user of the model's output",
        "unused": "called 0 times on this example",
        "before": "a layer that reads it is called several times",
    }


class OddReaders(nn.Module):
    """A hard swish of two names, and readers that need care: `kind` says which."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.stem, self.act = kind, nn.Conv2d(3, 6, 3), nn.Hardswish()
        self.again = self.act
        self.a, self.b = nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        nn.init.normal_(self.norm.running_mean)
        if kind == "parametrized":
            nn.utils.parametrizations.weight_norm(self.a)

    def forward(self, x):
        y = self.again(self.stem(x))
        if self.kind == "attribute":
            return self.a(y) + F.conv2d(y.data, self.a.weight)
        if self.kind == "indices":
            return self.a(F.max_pool2d(y, 2, return_indices=True)[0])
        if self.kind == "norm of two":
            return self.norm(self.a(y)), self.norm(self.b(x))
        return self.a(y)


@pytest.mark.parametrize("kind", ["two names", "attribute", "indices", "norm of two", "parametrized"])
def test_odd_readers_keep_the_function(kind):
    """Second names, attributes, several results, shared norms and computed weights: the function stays, shifted or not."""
    torch.manual_seed(0)
    model = OddReaders(kind).eval()
    padded = with_negative_padding(model, image())
    assert padded.rewritten == (("act",) if kind in ("two names", "norm of two") else ())
    with torch.no_grad():
        torch.testing.assert_close(padded.model(image(2)), model(image(2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["small", "torchvision"])
def test_mobilenets(name):
    """In MobileNetV3 every hard swish goes that feeds no squeeze-excite or shortcut, and what readers see is never negative."""
    torch.manual_seed(0)
    if name == "small":
        model, x = mobilenet_v3(10).eval(), torch.rand(2, 1, 32, 32)
        expected = {*(f"blocks.{i}.expand.act" for i in range(3, 7)), "head.act", "classifier.act"}
    else:
        models = pytest.importorskip("torchvision").models
        model, x = models.mobilenet_v3_small().eval(), torch.rand(2, 3, 64, 64)
        expected = {*(f"features.{i}.block.0.2" for i in range(4, 12)), "features.12.2", "classifier.1"}
    padded = with_negative_padding(model, x)
    assert expected <= set(padded.rewritten)
    lowest = []
    for place in padded.rewritten:
        padded.model.get_submodule(place).register_forward_hook(lambda _m, _i, output: lowest.append(float(output.min())))
    padded.model(x)
    assert len(lowest) == len(padded.rewritten)
    assert min(lowest) >= 0
