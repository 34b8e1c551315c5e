"""Symmetric integers without a zero, for values: int4m, int3m, int2m.

A vector is rotated (hadamard.py), which makes its elements nearly Gaussian around 0, then coded
on a grid whose levels lie halfway between multiples of the scale. With b bits, H = 2^(b - 1) and
m = max |x|, for each clip factor f = 1, 15/16, 14/16 ... 9/16:

    scale = float16(f * m / H), to nearest, at most 65504
    code  = clamp(floor(x / scale) + H, 0, 2 * H - 1)         IEEE division
    x'    = scale * (code - (H - 1/2))                        exact

and the factor with the least sum of (x' - x)^2 is kept, the largest of equal ones. Clipping a few
large elements pays from 4 bits down (midpoint grid and search: exllamav3, QuaRot). Every backend
must choose alike, so the sum is defined: squares in float32 (no fused multiply-add), added by
folding the vector on itself, x[i] + x[i + n/2], while its length n is even, then in order.

A scale of 0 decodes to zeros; its codes are made with the divisor 1. A vector with a NaN or Inf has
scale NaN (0x7E00) and codes 0.

Planes: ``scale`` (float16, one per token), then the codes (packing.py): b + 16 / D bits per
element where D is a multiple of 32.
For kernels it is an affine format with zero = -scale * (H - 1/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvant.formats import packing
from kvant.formats.base import Array, KVFormat, Plane

__all__ = ["Midpoint"]

_CLIPS = tuple(np.float32(16 - step) / np.float32(16) for step in range(8))


def _folded_sum(x: Array) -> Array:
    """Sum over the last axis in the order that the module's docstring defines."""
    while x.shape[-1] % 2 == 0:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    total = x[..., 0]
    for index in range(1, x.shape[-1]):
        total = total + x[..., index]
    return total


@dataclass(frozen=True, slots=True)
class Midpoint(KVFormat):
    """Scale per token, rotated."""

    name: str
    bits: int
    rotated: bool = True
    by_page: bool = False
    head_dim_multiple: int = 8

    def planes(self, head_dim: int) -> tuple[Plane, ...]:
        return Plane("scale", "float16", 0), *self._code_planes(self.bits, head_dim)

    def quantize(self, x: Array) -> tuple[Array, ...]:
        half = np.float32(1 << (self.bits - 1))
        with np.errstate(invalid="ignore", over="ignore"):
            largest = np.abs(x).max(axis=-1)
            finite = np.isfinite(largest)
            x = np.where(finite[..., None], x, np.float32(0))
            largest = np.where(finite, largest, np.float32(0))
            best: tuple[Array, Array, Array] | None = None
            for clip in _CLIPS:
                scale = np.minimum(clip * largest / half, np.float32(65504)).astype(np.float16)
                step = scale.astype(np.float32)[..., None]
                level = np.floor(x / np.where(step > 0, step, np.float32(1))) + half
                level = level.clip(0, 2 * half - 1)
                error = _folded_sum(np.square(step * (level - (half - np.float32(0.5))) - x))
                if best is None:
                    best = error, scale, level
                else:
                    better = error < best[0]
                    best = (
                        np.where(better, error, best[0]),
                        np.where(better, scale, best[1]),
                        np.where(better[..., None], level, best[2]),
                    )
        assert best is not None
        _, scale, level = best
        codes = np.where(finite[..., None], level, np.float32(0)).astype(np.uint8)
        scale = np.where(finite, scale, np.float16(np.nan))
        return scale, *packing.pack(codes, self.bits)

    def dequantize(self, planes: Sequence[Array], head_dim: int) -> Array:
        scale, *codes = planes
        level = packing.unpack(codes, self.bits, head_dim).astype(np.float32)
        centre = np.float32((1 << (self.bits - 1)) - 0.5)
        return scale.astype(np.float32)[..., None] * (level - centre)
