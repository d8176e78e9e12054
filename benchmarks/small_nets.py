"""Three small networks for 32x32 images of one channel, in the families that quantization papers report.

Plain modules with one call each, so that every convolution and linear layer can be quantized by name. The stem halves
the image, which makes a training step four times cheaper than in the networks they are modelled on.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


class ConvNorm(nn.Sequential):
    """`conv`, `norm` and, unless None, `act`: a convolution padded to keep the image's size at stride 1."""

    def __init__(
        self, n_in: int, n_out: int, kernel: int, stride: int = 1, *, groups: int = 1, act: Activation | None = nn.ReLU
    ) -> None:
        layers: list[tuple[str, nn.Module]] = [
            ("conv", nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)),
            ("norm", nn.BatchNorm2d(n_out)),
        ]
        if act is not None:
            layers.append(("act", act()))
        super().__init__(OrderedDict(layers))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, a 1x1 convolution where the shape changes (He et al. 2016, fig. 5 left)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNorm(n_in, n_out, 3, stride)
        self.second = ConvNorm(n_out, n_out, 3, act=None)
        same = stride == 1 and n_in == n_out
        self.shortcut: nn.Module = nn.Identity() if same else ConvNorm(n_in, n_out, 1, stride, act=None)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, n_in, H, W] to [N, n_out, H / stride, W / stride]."""
        out: Tensor = self.act(self.second(self.first(x)) + self.shortcut(x))
        return out


class SqueezeExcite(nn.Module):
    """Scales every channel by a gate computed from all channel means (Hu et al. 2018; hard sigmoid as in MobileNetV3)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU()
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """[N, channels, H, W] to the same shape."""
        gates: Tensor = self.gate(self.expand(self.act(self.reduce(self.pool(x)))))
        return x * gates


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, optional squeeze-excite, linear 1x1 projection (Sandler et al. 2018, table 1)."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        expanded: int,
        stride: int,
        *,
        kernel: int = 3,
        act: Activation = nn.ReLU6,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        self.expand: nn.Module = nn.Identity() if expanded == n_in else ConvNorm(n_in, expanded, 1, act=act)
        self.depthwise = ConvNorm(expanded, expanded, kernel, stride, groups=expanded, act=act)
        self.squeeze: nn.Module = SqueezeExcite(expanded, expanded // 4) if squeeze else nn.Identity()
        self.project = ConvNorm(expanded, n_out, 1, act=None)
        self.is_residual = stride == 1 and n_in == n_out

    def forward(self, x: Tensor) -> Tensor:
        """[N, n_in, H, W] to [N, n_out, H / stride, W / stride]."""
        out: Tensor = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + out if self.is_residual else out


class SmallNet(nn.Module):
    """A stem, blocks, a head, the mean over the image, and a classifier; `forward` takes [N, 1, 32, 32]."""

    def __init__(self, stem: nn.Module, blocks: list[nn.Module], head: nn.Module, classifier: nn.Module) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.Sequential(*blocks)
        self.head = head
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, n_classes]."""
        features = self.head(self.blocks(self.stem(images)))
        logits: Tensor = self.classifier(torch.flatten(self.pool(features), 1))
        return logits


def resnet20(n_classes: int, *, stem_stride: int = 2, width: int = 16) -> SmallNet:
    """Three stages of three basic blocks, 16-32-64 channels: the CIFAR ResNet-20 (He et al. 2016, section 4.2).

    `stem_stride=1` is the network of the paper, except that shortcuts that change the shape are 1x1 convolutions.
    """
    blocks: list[nn.Module] = []
    n_in = width
    for n_out, first_stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        for stride in (first_stride, 1, 1):
            blocks.append(BasicBlock(n_in, n_out, stride))
            n_in = n_out
    return SmallNet(ConvNorm(1, width, 3, stem_stride), blocks, nn.Identity(), nn.Linear(n_in, n_classes))


def mobilenet_v2(n_classes: int, *, stem_stride: int = 2) -> SmallNet:
    """Eight inverted residuals with ReLU6, 16 to 64 channels (MobileNetV2, Sandler et al. 2018, scaled to 32x32)."""
    blocks: list[nn.Module] = [InvertedResidual(16, 16, 16, 1)]
    n_in = 16
    for n_out, first_stride, n_blocks in ((24, 1, 1), (40, 2, 3), (64, 2, 3)):
        for stride in (first_stride, *[1] * (n_blocks - 1)):
            blocks.append(InvertedResidual(n_in, n_out, 4 * n_in, stride))
            n_in = n_out
    stem, head = ConvNorm(1, 16, 3, stem_stride, act=nn.ReLU6), ConvNorm(n_in, 192, 1, act=nn.ReLU6)
    return SmallNet(stem, blocks, head, nn.Linear(192, n_classes))


def mobilenet_v3(n_classes: int, *, stem_stride: int = 2) -> SmallNet:
    """Seven inverted residuals, most with 5x5 kernels, squeeze-excite and h-swish.

    MobileNetV3-Small (Howard et al. 2019, table 2), scaled to 32x32.
    """
    swish: dict[str, Any] = {"kernel": 5, "act": nn.Hardswish, "squeeze": True}
    blocks: list[nn.Module] = [
        InvertedResidual(16, 16, 16, 1, act=nn.ReLU, squeeze=True),
        InvertedResidual(16, 24, 64, 2, act=nn.ReLU),
        InvertedResidual(24, 24, 72, 1, act=nn.ReLU),
        InvertedResidual(24, 40, 96, 1, **swish),
        InvertedResidual(40, 40, 160, 1, **swish),
        InvertedResidual(40, 64, 160, 2, **swish),
        InvertedResidual(64, 64, 256, 1, **swish),
    ]
    stem, head = ConvNorm(1, 16, 3, stem_stride, act=nn.Hardswish), ConvNorm(64, 192, 1, act=nn.Hardswish)
    classifier = nn.Sequential(
        OrderedDict[str, nn.Module](hidden=nn.Linear(192, 128), act=nn.Hardswish(), output=nn.Linear(128, n_classes))
    )
    return SmallNet(stem, blocks, head, classifier)


SMALL_NETS: dict[str, Callable[[int], SmallNet]] = {
    "resnet20": resnet20,
    "mobilenet_v2": mobilenet_v2,
    "mobilenet_v3": mobilenet_v3,
}
