"""OpenVINO's packed integer types: codes <-> bytes.

Layouts as OpenVINO 2025.2 and later store them: u2 and the 4-bit types fill a byte from its low end; u3 keeps the low two
bits of eight values in two bytes and their high bits in a third, u6 the low four bits of four values in two bytes and their
high two bits in a third, first value at the high end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Storage:
    """An OpenVINO element type: its width, and the zero point that makes signed codes fit."""

    name: str
    bits: int
    zero_point: int


TYPES = (Storage("u2", 2, 2), Storage("u3", 3, 4), Storage("i4", 4, 0), Storage("u6", 6, 32), Storage("i8", 8, 0))
_ALL = {storage.name: storage for storage in TYPES}
_COMPACT = {2: "u2", 3: "u3", 4: "i4", 5: "u6", 6: "u6", 7: "i8", 8: "i8"}


def compact(bits: int) -> Storage:
    """The smallest type that holds weights of `bits` bits."""
    return _ALL[_COMPACT[bits]]


def widest() -> Storage:
    """The type that integer kernels read."""
    return _ALL["i8"]


def storage_of(element_type: str) -> Storage | None:
    """The storage with OpenVINO's name for it, or None for any other type."""
    return _ALL.get(element_type)


def pack(codes: np.ndarray, storage: Storage) -> np.ndarray:
    """Signed codes as the bytes [n] of a constant."""
    values = (codes.reshape(-1).astype(np.int16) + storage.zero_point).astype(np.int16)
    unsigned = (values & ((1 << storage.bits) - 1)).astype(np.uint8)
    if storage.bits == 8:
        return unsigned
    if storage.bits == 2:
        return _join(_rows(unsigned, 4), (0, 2, 4, 6))
    if storage.bits == 4:
        return _join(_rows(unsigned, 2), (0, 4))
    if storage.bits == 3:
        rows = _rows(unsigned, 8)
        low = _join((rows & 3).reshape(-1, 4), (6, 4, 2, 0)).reshape(-1, 2)
        return np.concatenate([low, _join(rows >> 2, tuple(range(7, -1, -1)))[:, None]], axis=1).reshape(-1)
    rows = _rows(unsigned, 4)
    low = _join((rows & 15).reshape(-1, 2), (4, 0)).reshape(-1, 2)
    return np.concatenate([low, _join(rows >> 4, (6, 4, 2, 0))[:, None]], axis=1).reshape(-1)


def unpack(data: np.ndarray, n_codes: int, storage: Storage) -> np.ndarray:
    """Inverse of `pack`: int8 codes [n_codes]."""
    data = data.reshape(-1).view(np.uint8)
    if storage.bits == 8:
        values = data
    elif storage.bits == 2:
        values = _split(data, (0, 2, 4, 6), 3)
    elif storage.bits == 4:
        values = _split(data, (0, 4), 15)
    elif storage.bits == 3:
        rows = data.reshape(-1, 3)
        values = _split(rows[:, :2].reshape(-1), (6, 4, 2, 0), 3) | _split(rows[:, 2], tuple(range(7, -1, -1)), 1) << 2
    else:
        rows = data.reshape(-1, 3)
        values = _split(rows[:, :2].reshape(-1), (4, 0), 15) | _split(rows[:, 2], (6, 4, 2, 0), 3) << 4
    values = values[:n_codes]
    if storage.zero_point:
        return (values.astype(np.int16) - storage.zero_point).astype(np.int8)
    if storage.bits == 4:
        return ((values ^ 8).astype(np.int16) - 8).astype(np.int8)
    return values.view(np.int8)


def _rows(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, (0, -len(values) % width)).reshape(-1, width)


def _join(rows: np.ndarray, shifts: tuple[int, ...]) -> np.ndarray:
    return np.bitwise_or.reduce(rows << np.array(shifts, np.uint8), axis=1).astype(np.uint8)


def _split(data: np.ndarray, shifts: tuple[int, ...], mask: int) -> np.ndarray:
    return ((data[:, None] >> np.array(shifts, np.uint8)) & np.uint8(mask)).reshape(-1)


def raw_bytes(constant: Any) -> np.ndarray:
    """The bytes of an OpenVINO constant."""
    return np.asarray(constant.data).reshape(-1).view(np.uint8)
