"""Codes of 2 to 8 bits as bytes.

A code is cut into fields of 8, 4, 2 or 1 bits, lowest bits first, and each width has a plane of
its own: 8 -> 8; 6 -> 4 + 2; 5 -> 4 + 1; 4 -> 4; 3 -> 2 + 1; 2 -> 2. In a plane of width w a vector
of D dimensions has C = D * w / 8 bytes, rounded up to a multiple of 4, and field ``j`` of byte
``c`` (its bits ``[j * w, (j + 1) * w)``) belongs to dimension ``c + j * C``. So a shift and a mask
of whole vectors give consecutive dimensions, and every byte belongs to one token. Fields without
a dimension are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["WIDTHS", "columns", "pack", "unpack"]

Array = NDArray[Any]

WIDTHS = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


def columns(width: int, head_dim: int) -> int:
    """Bytes of a vector in a plane of fields of ``width`` bits."""
    return -(-head_dim * width // 32) * 4


def pack(codes: Array, bits: int) -> tuple[Array, ...]:
    """Codes ``uint8 [..., D]`` as one ``uint8 [..., columns]`` array per plane."""
    planes, shift = [], 0
    for width in WIDTHS[bits]:
        count = columns(width, codes.shape[-1])
        padded = np.zeros((*codes.shape[:-1], count * 8 // width), np.uint8)
        padded[..., : codes.shape[-1]] = codes >> shift & ((1 << width) - 1)
        fields = padded.reshape(*codes.shape[:-1], 8 // width, count)
        places = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        planes.append(np.bitwise_or.reduce(fields << places, axis=-2))
        shift += width
    return tuple(planes)


def unpack(planes: Sequence[Array], bits: int, head_dim: int) -> Array:
    """Invert :func:`pack`: ``uint8 [..., D]``."""
    codes: Any = 0
    shift = 0
    for width, packed in zip(WIDTHS[bits], planes, strict=True):
        places = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        fields = packed[..., None, :] >> places & np.uint8((1 << width) - 1)
        flat = fields.reshape(*packed.shape[:-1], packed.shape[-1] * len(places))
        codes |= flat[..., :head_dim] << shift
        shift += width
    out: Array = np.asarray(codes, np.uint8)
    return out
