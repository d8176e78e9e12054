"""Random distortions: from undistorted ink to a noisy 32x32 image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from glyphs.fonts import INK_SIZE, MASTER_SIZE

IMAGE_SIZE = 32
_FINE = 2 * IMAGE_SIZE  # images are warped at twice the resolution, so that thin strokes do not break up


@final
@dataclass(frozen=True)
class Distortion:
    """How strongly glyphs are distorted; every amount is drawn anew for every image.

    `scale` is the least and largest longer side of the ink, `shift` and `bend` the largest displacement, all as shares
    of the image; `bend` displaces a 4x4 lattice. `stroke` thickens or thins by moving the threshold on blurred ink.
    `clutter` is the largest darkness of a second glyph that intrudes from a side, `contrast` the least darkness of the
    ink, `shade` the largest slope of the background, `noise` the largest standard deviation of the pixel noise.
    """

    rotation_degrees: float = 18.0
    shear: float = 0.3
    aspect: float = 1.25
    scale: tuple[float, float] = (0.45, 0.85)
    shift: float = 0.10
    bend: float = 0.05
    stroke: float = 0.15
    blur: float = 1.0
    clutter: float = 0.8
    contrast: float = 0.35
    shade: float = 0.25
    noise: float = 0.18

    def __call__(self, ink: Tensor, clutter: Tensor, generator: torch.Generator) -> Tensor:
        """Images [N, 1, 32, 32] in [-1, 1], 1 the darkest, of softened ink [N, S, S] beside `clutter` [N, S, S]."""
        draw = _Draw(len(ink), generator)
        glyph = self._strokes(_sampled(ink, _grid(self._transforms(draw), _FINE) + self._bends(draw)), draw)
        intruder = self._strokes(_sampled(clutter, _grid(self._transforms(draw, beside=True), IMAGE_SIZE)), draw)
        contrast = draw.between(self.contrast, 1.0)
        darkness = torch.maximum(_halved(glyph) * contrast, intruder * contrast * draw.between(0.0, self.clutter))
        image = torch.lerp(darkness, softened(darkness), draw.between(0.0, self.blur))
        image = image + self._shades(draw) + draw.between(0.02, self.noise) * draw.normal(1, IMAGE_SIZE, IMAGE_SIZE)
        return image.clamp(0, 1) * 2 - 1

    def _transforms(self, draw: _Draw, *, beside: bool = False) -> Tensor:
        """Maps [N, 2, 3] from positions in the image to positions in the ink, both from -1 to 1."""
        angle = draw.symmetric(math.radians(self.rotation_degrees))
        stretch = torch.exp(draw.symmetric(math.log(self.aspect) / 2))
        rotation = _matrix(angle.cos(), -angle.sin(), angle.sin(), angle.cos())
        shape = _matrix(stretch, draw.symmetric(self.shear), torch.zeros_like(stretch), 1 / stretch)
        scale = draw.between(*self.scale).squeeze(1) * MASTER_SIZE / INK_SIZE
        shift = 2 * self.shift * (2 * draw.uniform(2, 1) - 1)
        if beside:
            shift[:, 0] += 1.15 * draw.symmetric(1.0)[:, 0, 0].sign()
        to_ink = torch.linalg.inv(scale * (rotation @ shape))
        return torch.cat([to_ink, -to_ink @ shift], dim=2)

    def _bends(self, draw: _Draw) -> Tensor:
        lattice = 2 * self.bend * (2 * draw.uniform(2, 4, 4) - 1)
        identity = torch.eye(4).view(1, 4, 4, 1)
        spline = F.interpolate(identity, size=(_FINE, 1), mode="bicubic", align_corners=True)[0, :, :, 0]  # [4, 64]
        return (spline.T @ lattice @ spline).permute(0, 2, 3, 1)

    def _strokes(self, ink: Tensor, draw: _Draw) -> Tensor:
        return ((ink - 0.3 + draw.symmetric(self.stroke)) * 4 + 0.5).clamp(0, 1)

    def _shades(self, draw: _Draw) -> Tensor:
        ramp = torch.linspace(-0.5, 0.5, IMAGE_SIZE)
        slopes = draw.symmetric(self.shade) * ramp.view(1, 1, 1, -1) + draw.symmetric(self.shade) * ramp.view(1, 1, -1, 1)
        return draw.between(0.05, 0.25) + slopes


@dataclass(frozen=True)
class _Draw:
    """Random numbers for `n` images, one each, that broadcast against [N, 1, H, W]."""

    n: int
    generator: torch.Generator

    def between(self, low: float, high: float) -> Tensor:
        return low + (high - low) * self.uniform(1, 1, 1)

    def symmetric(self, largest: float) -> Tensor:
        return self.between(-largest, largest)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.n, *shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.n, *shape, generator=self.generator)


def softened(image: Tensor) -> Tensor:
    """`image` [..., S, S] averaged over 3x3 pixels twice."""
    # On one channel two products with a band matrix are twenty times faster than pooling.
    size = image.shape[-1]
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs()
    band = (3 - distance).clamp(min=0) / 9
    return band @ image @ band


def _halved(image: Tensor) -> Tensor:
    rows = image[..., ::2, :] + image[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) / 4


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Matrices [N, 2, 2] with rows (a, b) and (c, d), all [N, 1, 1, 1]."""
    return torch.cat([a, b, c, d], dim=1).view(-1, 2, 2)


def _grid(transforms: Tensor, size: int) -> Tensor:
    """Where in the ink each of the `size` x `size` pixels lies [N, size, size, 2]; affine_grid is four times slower."""
    centres = (torch.arange(size) + 0.5) * 2 / size - 1
    along_x, along_y, offset = (part.view(-1, 1, 1, 2) for part in transforms.unbind(2))
    return along_x * centres.view(1, 1, -1, 1) + (along_y * centres.view(1, -1, 1, 1) + offset)


def _sampled(ink: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(ink.unsqueeze(1), grid, align_corners=False)
