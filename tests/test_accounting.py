"""Every weight of a model is a layer's or stands in the skipped list: counts against the parameters themselves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from mpq_plugins import find_layers
from mpq_plugins.model.layers import distinct_weights


class Addmm(nn.Module):
    """A matrix [in, out] applied by addmm, as GPT-2 writes its layers."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out)), nn.Parameter(torch.zeros(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Recurrent(nn.Module):
    """An LSTM, a GRU cell and the head that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell, self.head = nn.LSTM(6, 5, batch_first=True), nn.GRUCell(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.cell(self.lstm(x)[0][:, -1]))


class Raw(nn.Module):
    """Parameters read by matmul, einsum, baddbmm, an add, a computed weight, and not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.w, self.e, self.b = (nn.Parameter(torch.randn(*shape)) for shape in ((6, 4), (5, 4), (2, 5, 3)))
        self.position, self.scaled, self.unused = (nn.Parameter(torch.randn(*s)) for s in ((7, 6), (3, 3), (9, 9)))
        self.never = nn.Linear(2, 2)

    def forward(self, x):  # [2, 7, 6]
        x = (self.first(x) + self.position) @ self.w
        x = torch.einsum("nti,oi->nto", x, self.e)
        x = torch.baddbmm(torch.zeros(2, 7, 3), x, self.b)
        return F.linear(x, self.scaled / self.scaled.norm())


class Attention(nn.Module):
    """Embedded tokens, attention, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class LowRank(nn.Linear):
    """A linear layer with a low-rank addition whose first factor is read before the weight itself."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return F.linear(F.linear(x, self.down), self.up) + F.linear(x, self.weight)


def standardised():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1))
    net[0]._conv_forward = lambda x, w, b: F.conv2d(x, w / w.std(), b)
    return net


CASES = {
    "addmm": (lambda: nn.Sequential(Addmm(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 7, 6)),
    "recurrent": (Recurrent, torch.randn(2, 7, 6)),
    "raw": (Raw, torch.randn(2, 7, 6)),
    "attention": (Attention, torch.randint(0, 11, (2, 7))),
    "low-rank": (lambda: nn.Sequential(LowRank(), nn.Linear(5, 2)), torch.randn(2, 6)),
    "standardised": (standardised, torch.randn(1, 3, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_weight_counts_once(name):
    """Layers and skipped entries hold all parameters of two or more dimensions between them, each once."""
    build, example = CASES[name]
    model = build()
    inventory = find_layers(model, example)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    assert distinct_weights(inventory) + sum(item.n_weights for item in inventory.skipped) == total
    assert len({item.name for item in inventory.skipped}) == len(inventory.skipped)


@pytest.mark.parametrize("name", CASES)
def test_excluded_layers_keep_the_count(name):
    """Excluding layers moves their weights to the skipped list and loses none, shared ones included."""
    build, example = CASES[name]
    model = build()
    names = [layer.name for layer in find_layers(model, example)]
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    for kept in names:
        inventory = find_layers(model, example, include=[kept])
        assert distinct_weights(inventory) + sum(item.n_weights for item in inventory.skipped) == total


@pytest.mark.parametrize(
    ("case", "name", "n_weights", "macs", "word"),
    [
        ("addmm", "0", 48, 7 * 48, "addmm"),
        ("recurrent", "lstm", 4 * 5 * (6 + 5), 7 * 4 * 5 * (6 + 5), "LSTM"),
        ("recurrent", "cell", 3 * 4 * (5 + 4), 3 * 4 * (5 + 4), "GRUCell"),
        ("raw", "w", 24, 7 * 24, "matmul"),
        ("raw", "e", 20, 7 * 20, "einsum"),
        ("raw", "b", 30, 7 * 15, "baddbmm"),  # each image has its own matrix
        ("raw", "position", 42, 0, "add"),
        ("raw", "scaled", 9, 7 * 9, "linear of a computed weight"),
        ("raw", "unused", 81, 0, "no operation"),
        ("raw", "never", 4, 0, "not called"),
        ("attention", "embedding", 0, 0, "Embedding"),  # the tied head holds them
        ("attention", "attention", 3 * 64, 7 * 3 * 64, "MultiheadAttention"),
        ("attention", "attention.out_proj", 64, 7 * 64, "multi_head_attention_forward reads its weight"),
    ],
)
def test_counts_and_reasons_equal_hand_worked_ones(case, name, n_weights, macs, word):
    """Weights and multiply-accumulates per image of what is skipped, with the operation that reads it."""
    build, example = CASES[case]
    entry = next(item for item in find_layers(build(), example).skipped if item.name == name)
    assert (entry.n_weights, entry.macs) == (n_weights, macs)
    assert word in entry.reason


def test_further_parameters_of_a_layer_are_layers_of_their_own():
    """A low-rank addition inside a linear layer does not count as calls of that layer."""
    inventory = find_layers(LowRank(), torch.randn(2, 6))
    assert {layer.name: (layer.macs, layer.n_calls) for layer in inventory} == {
        "down": (12, 1),
        "up": (10, 1),
        "weight": (30, 1),
    }


def test_parametrized_weights_count_as_their_layer():
    """What a parametrized weight is computed from is its layer's, and is not listed again."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3)))
    inventory = find_layers(model, torch.ones(1, 4))
    assert not inventory.skipped
    assert distinct_weights(inventory) == 12
