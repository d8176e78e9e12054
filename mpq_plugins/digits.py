"""scikit-learn's handwritten digits, and the small residual network of the demo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq_plugins.common.plugins import require
from mpq_plugins.common.progress import track
from mpq_plugins.model.run import Batch, labels_of

_N_TRAIN = 1200


def digits(*, train: bool, batch_size: int = 64, noise: float = 0.2) -> Sequence[Batch]:
    """Batches of the 1,797 digits, 1x8x8 in [-0.3, 0.7] with fixed additive noise that keeps the task from saturating.

    The first 1,200 of a fixed permutation are for training and calibration, the rest for testing.
    """
    bunch = require("sklearn.datasets", "demo").load_digits()
    generator = torch.Generator().manual_seed(0)
    images = torch.tensor(bunch.data, dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    labels = torch.tensor(bunch.target, dtype=torch.long)
    order = torch.randperm(len(images), generator=generator)
    images = (images + noise * torch.randn(images.shape, generator=generator))[order]
    part = slice(None, _N_TRAIN) if train else slice(_N_TRAIN, None)
    pairs = zip(torch.split(images[part], batch_size), torch.split(labels[order][part], batch_size), strict=True)
    return [Batch(x, y) for x, y in pairs]


class _Block(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.downsample(x))
        return out


class DigitsNet(nn.Module):
    """A residual network of 14 weighted layers (100 thousand weights) for 1x8x8 digits."""

    def __init__(self, n_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = nn.Sequential(_Block(width, width, 1), _Block(width, width, 1))
        self.layer2 = nn.Sequential(_Block(width, 2 * width, 2), _Block(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(_Block(2 * width, 4 * width, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, n_classes] of images [N, 1, 8, 8]."""
        x = self.layer3(self.layer2(self.layer1(self.relu(self.bn(self.stem(images))))))
        logits: Tensor = self.fc(torch.flatten(self.pool(x), 1))
        return logits


def trained_digits_net(*, epochs: int = 12, seed: int = 0) -> DigitsNet:
    """`DigitsNet` trained on the digits: SGD, one-cycle schedule, shifts by one pixel. Seconds on two cores."""
    batches = digits(train=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DigitsNet()
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(batches))
        for _ in track(range(epochs), "training on digits", total=epochs):
            for index in torch.randperm(len(batches)).tolist():
                batch = shifted(batches[index])
                optimizer.zero_grad()
                loss = F.cross_entropy(net(batch.inputs), labels_of(batch))
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                schedule.step()
    return net.eval()


def shifted(batch: Batch, generator: torch.Generator | None = None) -> Batch:
    """The images rolled by up to one pixel, all alike."""
    shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
    return Batch(torch.roll(batch.inputs, shift, dims=(2, 3)), batch.labels)
