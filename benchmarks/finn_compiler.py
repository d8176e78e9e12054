"""Six shapes of network, exported for FINN and judged by its own compiler: the table of docs/brevitas.md.

MPQ_FINN=FOLDER python benchmarks/finn_compiler.py [SHAPE ...]
"""

import sys
import tempfile
from pathlib import Path

import torch
from mpq_brevitas import BrevitasAdapter
from mpq_brevitas.compilers import Report, judge
from mpq_brevitas.finn_judge import STEPS
from torch import nn

import mpq_plugins as mpq


class Residual(nn.Module):
    """A convolution, a block around which its input goes, global average pooling, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.stem_norm(self.stem(x)))
        y = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(x + self.second_norm(self.second(y)))
        return self.classifier(self.pool(x).flatten(1))


class Joined(nn.Module):
    """Two convolutions whose outputs behind ReLUs are joined along the channels, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.last, self.classifier = nn.Conv2d(16, 8, 3, stride=2), nn.Linear(8 * 3 * 3, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        return self.classifier(torch.relu(self.last(x)).flatten(1))


def perceptron():
    """Linear layers only."""
    return nn.Sequential(*(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))


def convolutional():
    """Convolutions, a maximum over pixels, and a classifier."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(16, 10)),
    )


def depthwise():
    """A MobileNet block and global average pooling."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def flattened():
    """Images as rows, then linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10))


def leaky():
    """Refused: FINN has no hardware for LeakyReLU between layers."""
    return nn.Sequential(nn.Linear(16, 8), nn.LeakyReLU(), nn.Linear(8, 4))


# name: (network, shape of one input)
SHAPES = {
    "perceptron": (perceptron, (64,)),
    "convolutional": (convolutional, (3, 8, 8)),
    "residual": (Residual, (3, 8, 8)),
    "concatenated": (Joined, (3, 8, 8)),
    "depthwise": (depthwise, (3, 8, 8)),
    "flattened": (flattened, (3, 8, 8)),
}
REFUSED = {"leaky": (leaky, (16,))}


def judged(name: str, folder: Path, *, scales: str = "float") -> Report:
    """The shape's network, its weights of 4, 8, 3 and 6 bits in turn and its activations of 4, and what FINN says."""
    build, shape = (SHAPES | REFUSED)[name]
    torch.manual_seed(0)
    model, images = build(), torch.randn(16, *shape)
    with torch.no_grad():
        for _ in range(4):
            model.train()(images)  # statistics other than those of the start
    inventory = mpq.find_layers(model.eval(), images[:1])
    widths = (4, 8, 3, 6)
    bits = mpq.BitConfig({layer.name: f"w{widths[i % 4]}a4" for i, layer in enumerate(inventory)}, inventory.fingerprint)
    adapter = BrevitasAdapter(profile="finn", scales=scales)
    module = adapter.prepare(model, bits, images[:1], [images])
    return judge(adapter.export(module, folder / f"{name}.onnx", images[:1]), module, images[:4])


def main(names: list[str]) -> None:
    """Print the table."""
    print("| shape | steps | largest difference | LUT | DSP | BRAM18 | cycles | CPU s |\n|---|---|---|---|---|---|---|---|")
    for name in names or [*SHAPES, *REFUSED]:
        with tempfile.TemporaryDirectory() as folder:
            report = judged(name, Path(folder))
        largest = max(step.difference or 0 for step in report.steps)
        seconds = sum(step.cpu_seconds for step in report.steps)
        passed = sum(step.ok for step in report.steps)
        row = [name, f"{passed} of {len(STEPS)}", f"{largest:.0e}"]
        if report.total:
            row += [f"{report.total[key]:,.0f}" for key in ("lut", "dsp", "bram18", "max_cycles")]
        else:
            failed = report.steps[-1]
            row += [f"refused in {failed.name} at {failed.node}, layer {failed.layer}", "", "", ""]
        print("| " + " | ".join([*row, f"{seconds:.1f}"]) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
