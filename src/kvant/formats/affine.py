"""Asymmetric integers: codes with a scale and a zero, per token or per channel.

For a group of N float32 elements and b bits, with L = 2^b - 1:

    zero  = float16(min x), rounded down
    scale = float16((max x - zero) / L), rounded up
    code  = clamp(rint((x - zero) / scale), 0, L)         rint: half to even; IEEE division
    x'    = scale * code + zero                           one rounding: the product is exact

Codes are made with the *stored* zero and scale. Because of the directed roundings every x lies
in [zero, zero + L * scale], so nothing is clipped and

    |x - x'| <= scale / 2        (plus float32 rounding of the division)

for any x with min x >= -65504 and max x - zero <= L * 65504; outside that it saturates (and the
rotation of an h format overflows to NaN where components reach 1e37). This covers the cases in
which other engines fail: a constant group (scale 0 or tiny: the zero carries it, no division
by zero), tiny ranges (scale is rounded up to at least 2^-24; ranges below float32's normal
numbers may lose bits), large offsets (the zero is below the minimum, not above it). float16
metadata with float32 arithmetic is 1.3 to 1.8 times more accurate at 8 bits than the bfloat16
metadata of engines that keep it in the model's dtype. A group with a NaN or an Inf gets scale =
NaN (0x7E00) and codes 0: it decodes to NaN as a whole, loudly, and no other group is touched.

By token: a group is a token's vector (int8, int4), or its randomized Hadamard rotation
(int8h, int4h; hadamard.py). Planes, in order: ``scale``, ``zero`` (float16, one per token), then
the codes (packing.py). b + 32 / D bits per element. The arithmetic is LMDeploy's (per head, per
token, asymmetric, no calibration) with the roundings above.

By page: a group is one dimension over the 64 tokens of a page (int4c and others), after
KIVI (arXiv 2402.02750), at page granularity: keys have channels that are large for all tokens, and
a large offset, as that of Qwen2's key bias, goes into the zero. Planes: ``scale``, ``zero``
(float16, one per dimension), codes. b + 0.5 bits per element where D is a multiple of 32. The page
is encoded as a whole, once it is full. A token that is not finite makes its channel NaN in all 64
tokens of the page: whoever sees any of them gets NaN.

Zeros are in value units, so x' is one multiply-add and scales and zeros factor out of integer dot
products: with a token's scale and zero, q . x' = scale * (q . code) + zero * sum(q); with a
channel's, q . x' = (q * scale) . code + q . zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvant.formats import packing
from kvant.formats.base import Array, KVFormat, Plane

__all__ = ["Affine", "f16_down"]

_F16_MAX = np.float32(65504)


def f16_down(x: Array) -> Array:
    """Largest finite float16 <= x (or -65504), as float32; +0 for either zero."""
    half = np.clip(x, -_F16_MAX, _F16_MAX).astype(np.float16)
    half = np.where(half.astype(np.float32) > x, np.nextafter(half, np.float16(-np.inf)), half)
    return np.maximum(half.astype(np.float32), -_F16_MAX) + np.float32(0)


def _quantize(x: Array, levels: int, axis: int) -> tuple[Array, Array, Array]:
    """Scales and zeros (float16) of the groups along ``axis``, and codes like ``x``."""
    with np.errstate(invalid="ignore", over="ignore"):
        low, high = x.min(axis=axis), x.max(axis=axis)
        zero = f16_down(low)
        # rounding up is rounding the negative down; -(+0) is cleaned by adding 0
        span = np.maximum(high - zero, np.float32(0))
        scale = -f16_down(-span / np.float32(levels)) + np.float32(0)
        finite = np.isfinite(low) & np.isfinite(high)
        scale = np.where(finite, scale, np.float32(np.nan))
        zero = np.where(finite, zero, np.float32(0))
        divisor = np.where(scale > 0, scale, np.float32(1))
        steps = (x - np.expand_dims(zero, axis)) / np.expand_dims(divisor, axis)
        codes = np.rint(steps).clip(0, levels)
        codes = np.where(np.expand_dims(finite, axis), codes, np.float32(0)).astype(np.uint8)
    return scale.astype(np.float16), zero.astype(np.float16), codes


@dataclass(frozen=True, slots=True)
class Affine(KVFormat):
    """Scale and zero per token, or with ``by_page`` per dimension over the 64 tokens of a page;
    ``rotated`` selects the ``h`` variant."""

    name: str
    bits: int
    rotated: bool = False
    by_page: bool = False
    head_dim_multiple: int = 8

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def _axis(self) -> int:
        """The axis of ``[..., 64, D]`` along which a group lies."""
        return -2 if self.by_page else -1

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        of: Literal["token", "page"] = "page" if self.by_page else "token"
        columns = head_dim if self.by_page else 0
        scalars = (Plane(name, "float16", columns, of) for name in ("scale", "zero"))
        return *scalars, *self._code_planes(self.bits, head_dim)

    def quantize(self, x: Array) -> tuple[Array, ...]:
        scale, zero, codes = _quantize(x, self.levels, self._axis)
        return scale, zero, *packing.pack(codes, self.bits)

    def dequantize(self, planes: Sequence[Array], head_dim: int) -> Array:
        scale, zero, *packed = planes
        codes = packing.unpack(packed, self.bits, head_dim).astype(np.float32)
        scale, zero = (np.expand_dims(of.astype(np.float32), self._axis) for of in (scale, zero))
        return codes * scale + zero
