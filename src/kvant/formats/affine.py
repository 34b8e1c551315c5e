"""Asymmetric integers, one scale and one zero per token and KV head: int8, int4, int8h, int4h.

For one vector x of D float32 elements and b bits, with L = 2^b - 1:

    zero  = float16(min x), rounded down
    scale = float16((max x - zero) / L), rounded up
    code  = clamp(rint((x - zero) / scale), 0, L)         rint: half to even; IEEE division
    x'    = scale * code + zero                           one rounding: the product is exact

Codes are made with the *stored* zero and scale. Because of the directed roundings every x lies
in [zero, zero + L * scale], so nothing is clipped and

    |x - x'| <= scale / 2        (plus float32 rounding of the division)

for any x with min x >= -65504 and max x - zero <= L * 65504; outside that it saturates (and the
rotation of an h format overflows to NaN where components reach 1e37). This covers the cases in
which other engines fail: a constant vector (scale 0 or tiny: the zero carries it, no division
by zero), tiny ranges (scale is rounded up to at least 2^-24; ranges below float32's normal
numbers count as 0), large offsets (the zero is below the minimum, not above it). float16
metadata with float32 arithmetic is 1.3 to 1.8 times more accurate at 8 bits than the bfloat16
metadata of engines that keep it in the model's dtype. A vector with a NaN or an Inf gets scale =
NaN and codes 0: it decodes to NaN as a whole, loudly, and no other token or head is touched.

Planes, in order: ``scale`` (float16), ``zero`` (float16), ``codes`` (bytes). At 8 bits column
d is dimension d; at 4 bits the low nibble of column d is dimension d and the high nibble
dimension d + D/2. Bits per element: b + 32 / D (8.5 and 4.5 at D = 64, 8.25 and 4.25 at 128).

``h`` formats store the randomized Hadamard rotation of the vector (hadamard.py). The
arithmetic is LMDeploy's (per head, per token, asymmetric, no calibration) with the roundings
above; the zero is in value units, so x' is one multiply-add and scales and zeros factor out
of integer dot products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvant.formats.base import Array, KVFormat, Plane

__all__ = ["Affine"]

_F16_MAX = np.float32(65504)


def _f16_down(x: Array) -> Array:
    """Largest finite float16 <= x (or -65504), as float32; +0 for either zero."""
    half = np.clip(x, -_F16_MAX, _F16_MAX).astype(np.float16)
    half = np.where(half.astype(np.float32) > x, np.nextafter(half, np.float16(-np.inf)), half)
    return np.maximum(half.astype(np.float32), -_F16_MAX) + np.float32(0)


@dataclass(frozen=True, slots=True)
class Affine(KVFormat):
    """``bits`` is 8 or 4; ``rotated`` selects the ``h`` variant."""

    name: str
    bits: int
    rotated: bool
    head_dim_multiple: int = 8

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return (
            Plane("scale", "float16", 0),
            Plane("zero", "float16", 0),
            Plane("codes", "uint8", head_dim * self.bits // 8),
        )

    def quantize(self, x: Array) -> tuple[Array, ...]:
        with np.errstate(invalid="ignore", over="ignore"):
            low, high = x.min(axis=-1), x.max(axis=-1)
            zero = _f16_down(low)
            # rounding up is rounding the negative down; -(+0) is cleaned by adding 0
            span = np.maximum(high - zero, np.float32(0))
            scale = -_f16_down(-span / np.float32(self.levels)) + np.float32(0)
            finite = np.isfinite(low) & np.isfinite(high)
            scale = np.where(finite, scale, np.float32(np.nan))
            zero = np.where(finite, zero, np.float32(0))
            divisor = np.where(scale > 0, scale, np.float32(1))[..., None]
            codes = np.rint((x - zero[..., None]) / divisor).clip(0, self.levels)
            codes = np.where(finite[..., None], codes, np.float32(0)).astype(np.uint8)
        if self.bits == 4:
            half = x.shape[-1] // 2
            codes = codes[..., :half] | codes[..., half:] << 4
        return scale.astype(np.float16), zero.astype(np.float16), codes

    def dequantize(self, planes: Sequence[Array], head_dim: int) -> Array:  # noqa: ARG002
        scale, zero, codes = planes
        if self.bits == 4:
            codes = np.concatenate((codes & 15, codes >> 4), axis=-1)
        scale, zero = scale.astype(np.float32), zero.astype(np.float32)
        return codes.astype(np.float32) * scale[..., None] + zero[..., None]
