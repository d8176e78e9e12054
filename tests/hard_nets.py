"""Small models that are hard to replay, with inputs for them."""

import torch
import torch.nn.functional as F
from naive_loops import with_statistics
from torch import nn
from torch.nn.utils import parametrizations

from mpq_plugins import Batch, Space, find_layers, menu


class InPlaceShortcut(nn.Module):
    """A residual block whose sum and activation are written over the branch that a change of the shortcut leaves as it is."""

    def __init__(self):
        super().__init__()
        self.stem, self.main, self.norm = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.shortcut, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.stem(x))
        y = self.norm(self.main(x))
        y += self.shortcut(x)
        y = self.relu(y)
        return self.head(y.mean((2, 3)))


class Calls(nn.Module):
    """A module called twice, a second module with its weight, and a functional call on a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.twice, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.other, self.tied = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.tied.weight = self.other.weight
        self.bare = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x):
        x = self.norm(self.twice(torch.relu(self.twice(x))))
        x = self.tied(torch.relu(self.other(x)))
        return F.conv2d(x, self.bare).amax((2, 3))


class Decoder(nn.Module):
    """A parametrized convolution, a strided grouped one, and a transposed one with its normalisation."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
        self.norm1 = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 8, 3, stride=2, groups=2, padding=1, padding_mode="circular")
        self.up, self.norm = nn.ConvTranspose2d(8, 6, 4, stride=2, groups=2), nn.BatchNorm2d(6)
        self.last = nn.Conv1d(6, 2, 3, padding="same", dilation=2)

    def forward(self, x):
        x = torch.relu(self.norm1(self.first(x)))
        return self.last(torch.relu(self.norm(self.up(self.down(x)))).flatten(2))


class TwoReaders(nn.Module):
    """A convolution whose output is read by its normalisation and by something else, so that they cannot be merged."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(8, 3, 3)
        self.last = nn.BatchNorm2d(3)

    def forward(self, x):
        raw = self.conv(x)
        return self.last(self.head(torch.cat([raw, self.norm(raw).relu_()], dim=1))).amax((2, 3))


class Dense(nn.Module):
    """Pre-activation layers that read all features before them."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3 + 2 * index) for index in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(3 + 2 * index, 2, 3, padding=1) for index in range(3))
        self.head = nn.Linear(9, 4)

    def forward(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            joined = torch.cat(features, 1)
            features.append(conv(F.relu(norm(joined), inplace=True)))
        return self.head(torch.cat(features, 1).mean((2, 3)))


class Attention(nn.Module):
    """Attention written with views, chunks and sizes, with masks and positions made on the fly."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.positions = nn.Linear(8, 24), nn.Linear(8, 8), nn.Embedding(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        n, length, width = x.shape
        x = x + self.positions(torch.arange(length, device=x.device))
        mask = torch.zeros(length, length)
        mask[0, 1:] = float("-inf")
        q, k, v = (part.reshape(n, x.shape[1], 2, width // 2).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        weights = ((q @ k.transpose(-2, -1)) / (width // 2) ** 0.5 + mask).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).contiguous().view(n, -1, width))
        return self.norm(x)


class LibraryAttention(nn.Module):
    """torch's own attention, which reads one weight for three projections."""

    def __init__(self):
        super().__init__()
        self.before, self.attention, self.after = (
            nn.Linear(8, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
            nn.Linear(8, 3),
        )

    def forward(self, x):
        x = self.before(x)
        return self.after(x + self.attention(x, x, x, need_weights=False)[0]).mean(1)


class Forms(nn.Module):
    """Several inputs, outputs in a dict, random numbers, and an in-place change whose returned value nobody reads."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.register_buffer("scale", torch.tensor(2.0))
        self.drop = nn.Dropout(0.5)

    def forward(self, first, second, factor=1.0):
        x, y = self.a(first), self.b(second)
        x.add_(y)
        x *= factor * self.scale
        return {"logits": self.head(self.drop(x.clamp_(min=0))), "hidden": x, "n": len(first)}


class Steps(nn.Module):
    """In-place changes of the first half of a tensor, through a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        first, _ = x.chunk(2, dim=1)
        first.mul_(3)
        return self.b(x)


class Branching(nn.Module):
    """Takes another path for other activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.relu()) if x.sum() > 1e3 else self.c(x)


class Masked(nn.Module):
    """Reads what it counted, as early-exit and mixture-of-expert models do: the count changes with the weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x):
        x = self.a(x)
        for _ in range(int((x > 0.3).sum()) % 4):
            x = torch.tanh(x)
        return self.b(x) + self.c(x)


class Scattered(nn.Module):
    """Writes rows of a buffer made on the fly from activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 3)

    def forward(self, x):
        both = torch.zeros(len(x), 8, dtype=x.dtype)
        both[:, :4] = self.a(x)
        both[:, 4:] = self.b(x)
        return self.c(both)


class ShapeFirst(nn.Module):
    """Folds the images of a batch into another axis on the way, so that nothing can be stacked."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.a(x)).t()
        return self.b(x.reshape(6, -1).t())


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
ROWS = torch.randn(3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
TWO = {"first": ROWS[:, :5], "second": ROWS[:, 2:], "factor": 0.5}

# model, its inputs, whether it replays (False: plain passes are used)
HARD = [
    (InPlaceShortcut, IMAGES, True),
    (Calls, IMAGES, True),
    (Decoder, IMAGES, True),
    (TwoReaders, IMAGES, True),
    (Dense, IMAGES, True),
    (Attention, TOKENS, True),
    (LibraryAttention, TOKENS, True),
    (Forms, TWO, True),
    (Forms, tuple(TWO.values()), True),
    (Steps, ROWS, False),
    (Branching, ROWS, False),
    (Masked, ROWS, False),
    (Scattered, ROWS, False),
    (ShapeFirst, ROWS, True),
]


def made(build, inputs):
    torch.manual_seed(0)
    model = with_statistics(build().double(), inputs)
    example = Batch(inputs).part(0, 1).inputs
    return model, Space.build(find_layers(model, example), menu((2, 3), (8,)))


def output_of(model):
    return "logits" if isinstance(model, Forms) else None
