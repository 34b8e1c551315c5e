"""8-bit floats with a scale per token: fp8.

For a vector x of float32 elements, with m = max |x|:

    scale = float16(m / 448), rounded up, at most 65504
    code  = e4m3(x / scale), to nearest even                  IEEE division
    x'    = scale * e4m3                                      exact

e4m3 is torch's float8_e4m3fn (OCP 8-bit Floating Point Specification, 2023): a sign, 4 bits of
exponent, 3 of mantissa; at most 448, subnormal numbers down to 2^-9, no infinity. Its NaN (0x7F,
0xFF) is never stored. Each vector has its own scale, so nothing is calibrated and nothing clipped:

    |x - x'| <= max(|x| / 17, scale / 1024)        (plus float32 rounding of the division)

for m <= 448 * 65504; beyond that it saturates. A scale of 0 decodes to zeros; its codes are made
with the divisor 1. A vector with a NaN or Inf has scale NaN (0x7E00) and codes 0.

The error is relative to each element where that of an integer is relative to the largest: next to
the largest, elements are 9 times as coarse as in int8 of a symmetric vector, and only those below a
14th of it are finer. SmolLM2-135M loses 15 times as much as with int8, of about as many bytes
(docs/formats.md): fp8 is for small elements that matter beside large ones, and for others who read
e4m3.

Planes: ``scale`` (float16, one per token), then the codes, a byte each: 8 + 16 / D bits an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvant.formats.affine import f16_down
from kvant.formats.base import Array, KVFormat, Plane

__all__ = ["Float8"]

_MAX = np.float32(448)
_LEAST_NORMAL = np.float32(2.0**-6)


def _to_e4m3(x: Array) -> Array:
    """The bits of finite float32 numbers as e4m3."""
    size = np.minimum(np.abs(x), _MAX)
    bits = size.view(np.uint32)
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    subnormal = np.rint(size * np.float32(512)).astype(np.uint32)
    code: Array = np.where(size < _LEAST_NORMAL, subnormal, normal)
    code |= np.signbit(x).astype(np.uint32) << 7
    return code.astype(np.uint8)


def _from_e4m3(codes: Array) -> Array:
    """Float32 numbers: e4m3 has the upper exponents and mantissas of float16, times 256."""
    wide = codes.astype(np.uint16)
    half = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view(np.float16)
    return half.astype(np.float32) * np.float32(256)


@dataclass(frozen=True, slots=True)
class Float8(KVFormat):
    """Scale per token, e4m3."""

    name: str
    bits: int = 8
    rotated: bool = False
    by_page: bool = False
    head_dim_multiple: int = 8

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return Plane("scale", "float16", 0), *self._code_planes(self.bits, head_dim)

    def quantize(self, x: Array) -> tuple[Array, ...]:
        with np.errstate(invalid="ignore", over="ignore"):
            largest = np.abs(x).max(axis=-1)
            finite = np.isfinite(largest)
            x = np.where(finite[..., None], x, np.float32(0))
            scale = -f16_down(-largest / _MAX) + np.float32(0)
            divisor = np.where(finite & (scale > 0), scale, np.float32(1))
            codes = _to_e4m3(x / divisor[..., None])
            scale = np.where(finite, scale, np.float32(np.nan))
        return scale.astype(np.float16), codes

    def dequantize(self, planes: Sequence[Array], head_dim: int) -> Array:  # noqa: ARG002
        scale, codes = planes
        return scale.astype(np.float32)[..., None] * _from_e4m3(codes)
