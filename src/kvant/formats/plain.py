"""Identity formats: the vector itself in f32, f16 or bf16.

    f32    32 bits per element, exact
    f16    16 bits, round to nearest even, |x - x'| <= 2^-11 |x| + 2^-25; saturates at +-65504
    bf16   16 bits, round to nearest even, |x - x'| <= 2^-8 |x| for normal x; overflows to Inf

One plane, ``values [D]``. A NaN (stored as 0x7E00 or 0x7FC0 in 16 bits) or Inf
stays in its own element. They take the same path as
the quantized formats: the 16-bit cache is not a special case anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvant.formats.base import Array, KVFormat, Plane

__all__ = ["Plain", "from_bf16", "to_bf16"]


def to_bf16(x: Array) -> Array:
    """The bits of float32 numbers rounded to bfloat16, uint16; a NaN is 0x7FC0."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(x: Array) -> Array:
    """The numbers of such bits, float32."""
    return (x.astype(np.uint32) << 16).view(np.float32)


def _to_f16(x: Array) -> Array:
    half = np.where(np.isinf(x), x, np.clip(x, -65504, 65504)).astype(np.float16)
    return np.where(np.isnan(x), np.uint16(0x7E00).view(np.float16), half)


@dataclass(frozen=True, slots=True)
class Plain(KVFormat):
    """``name`` is one of ``f32``, ``f16``, ``bf16``."""

    name: str
    bits: int
    rotated: bool = False
    by_page: bool = False
    head_dim_multiple: int = 2

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        dtype = {"f32": "float32", "f16": "float16", "bf16": "uint16"}[self.name]
        return (Plane("values", dtype, head_dim),)

    def quantize(self, x: Array) -> tuple[Array, ...]:
        if self.name == "f32":
            return (x,)
        return (to_bf16(x) if self.name == "bf16" else _to_f16(x),)

    def dequantize(self, planes: Sequence[Array], head_dim: int) -> Array:  # noqa: ARG002
        (values,) = planes
        return from_bf16(values) if self.name == "bf16" else values.astype(np.float32)
