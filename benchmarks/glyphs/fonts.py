"""Undistorted glyphs: every character in every font that has it, drawn once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq_plugins.common.plugins import require

DIGITS = "123456789"
CAPITALS = "ABCDEFGHJKLMNOPQRSTUVWXYZ"
SMALL = "abdefghijkmnpqrtuy"
GREEK = "ΓΔΘΛΞΠΣΦΨΩαβγδζλμξσω"
# Size and position are random, so c o s v w x z are C O S V W X Z, 0 is O, I and l are 1 in some font, and most other
# Greek letters are a Latin letter or a Greek capital. None of them is drawn.
CLASSES = DIGITS + CAPITALS + SMALL + GREEK
"""One character per class, in the order of the labels."""

_DEJAVU = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSans-BoldOblique DejaVuSansMono DejaVuSansMono-Bold "
    "DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic DejaVuSerif-BoldItalic"
)
_STIX = "STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta"
# Their Greek has code points of its own; cmsy10, cmmi10 and cmex10 hold symbols where one expects letters.
_COMPUTER_MODERN = "cmr10 cmb10 cmss10 cmti10 cmtt10"
FONTS = tuple(f"{_DEJAVU} {_STIX} {_COMPUTER_MODERN}".split())
"""Fonts that matplotlib ships and that hold letters."""

HELD_OUT_FONTS = ("DejaVuSansMono", "DejaVuSerif-Italic", "STIXGeneralBolIta", "cmss10")
"""Fonts that only test images use; each has relatives among the others."""

MASTER_SIZE = 64
INK_SIZE = 44


@functools.cache
def masters(fonts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Ink in [0, 1] of every character in every one of `fonts` that has it [M, 64, 64], and their classes [M].

    The bounding box is centred, its longer side 44 pixels. Raises `MissingExtraError` without matplotlib.
    """
    ft2font = require("matplotlib.ft2font", "plots")
    folder = Path(require("matplotlib", "plots").get_data_path(), "fonts", "ttf")
    inks, labels = [], []
    for name in fonts:
        font = ft2font.FT2Font(str(folder / f"{name}.ttf"))
        characters = font.get_charmap()
        for label, character in enumerate(CLASSES):
            if ord(character) in characters:
                inks.append(_centred(_drawn(font, character)))
                labels.append(label)
    return torch.from_numpy(np.stack(inks)), torch.tensor(labels)


def _drawn(font: Any, character: str) -> np.ndarray[Any, Any]:
    # The size that gives the wanted bounding box is known only after drawing once at another size.
    first = _image(font, character, 100.0)
    return _image(font, character, 100.0 * INK_SIZE / max(first.shape))


def _image(font: Any, character: str, size: float) -> np.ndarray[Any, Any]:
    font.set_size(size, 72)
    font.set_text(character)
    font.draw_glyphs_to_bitmap(antialiased=True)
    image = np.asarray(font.get_image(), dtype=np.float32) / 255
    rows, columns = np.flatnonzero(image.max(1)), np.flatnonzero(image.max(0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _centred(ink: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    canvas = np.zeros((MASTER_SIZE, MASTER_SIZE), dtype=np.float32)
    height, width = ink.shape
    top, left = (MASTER_SIZE - height) // 2, (MASTER_SIZE - width) // 2
    canvas[top : top + height, left : left + width] = ink
    return canvas
