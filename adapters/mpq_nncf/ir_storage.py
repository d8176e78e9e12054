"""OpenVINO's packed integer types: codes <-> bytes.

Layouts as OpenVINO 2025.2 and later store them: u2 and the 4-bit types fill a byte from its low end; u3 keeps the low two
bits of eight values in two bytes and their high bits in a third, u6 the low four bits of four values in two bytes and their
high two bits in a third, first value at the high end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
    planes, n_values = _layout(storage.bits)
    values = (codes.reshape(-1).astype(np.int16) + storage.zero_point).astype(np.uint8)
    rows = np.pad(values, (0, -len(values) % n_values)).reshape(-1, n_values)
    parts = []
    for plane in planes:
        bits = ((rows >> plane.first) & plane.mask).reshape(-1, len(plane.shifts))
        parts.append(np.bitwise_or.reduce(bits << plane.shifts, axis=1).astype(np.uint8).reshape(len(rows), -1))
    return np.concatenate(parts, axis=1).reshape(-1)


def unpack(data: np.ndarray, n_codes: int, storage: Storage) -> np.ndarray:
    """Inverse of `pack`: int8 codes [n_codes]."""
    planes, n_values = _layout(storage.bits)
    rows = data.reshape(-1).view(np.uint8).reshape(-1, n_values * storage.bits // 8)
    values, start = np.zeros(len(rows) * n_values, np.uint8), 0
    for plane in planes:
        end = start + n_values // len(plane.shifts)
        values |= ((rows[:, start:end].reshape(-1, 1) >> plane.shifts) & plane.mask).reshape(-1) << plane.first
        start = end
    half = np.uint8(1 << (storage.bits - 1))
    # Two's complement is what a zero point in the middle gives, with the highest bit turned.
    shifted, zero_point = (values, storage.zero_point) if storage.zero_point else (values ^ half, int(half))
    return (shifted[:n_codes].astype(np.int16) - zero_point).astype(np.int8)


class _Plane(NamedTuple):
    """Some bits of every value: the first of them, a mask as wide as they are, and where a byte has those of each value."""

    first: np.uint8
    mask: np.uint8
    shifts: np.ndarray


def _layout(bits: int) -> tuple[list[_Plane], int]:
    """The planes that values of so many bits are stored in, one after the other, and for how many values at a time."""
    widths = {3: (2, 1), 6: (4, 2)}.get(bits, (bits,))
    order = -1 if len(widths) > 1 else 1
    starts = (0, widths[0])
    planes = [
        _Plane(np.uint8(start), np.uint8((1 << width) - 1), np.arange(0, 8, width, np.uint8)[::order])
        for start, width in zip(starts, widths, strict=False)
    ]
    return planes, 8 // widths[-1]


def raw_bytes(constant: Any) -> np.ndarray:
    """The bytes of an OpenVINO constant."""
    return np.asarray(constant.data).reshape(-1).view(np.uint8)
