"""The randomized Hadamard rotation of a head vector.

    rotate(x)   = H (s * x) / sqrt(B)        unrotate(y) = s * (H y / sqrt(B))

H is the Sylvester-Hadamard matrix over blocks of B dimensions, B the largest power of two that
divides head_dim (128 -> 128, 96 -> 3 blocks of 32, 80 -> 5 of 16), and s a fixed vector of
signs. The rotation is orthogonal, so dot products of a rotated query with rotated keys are
those of the originals; it spreads a large channel over the block, which is what makes 4 bits
per element enough. Source: QuaRot (arXiv 2404.00456); signs as in QuIP# (arXiv 2402.04396).

The bytes of a page depend on the exact float32 arithmetic, so it is part of the format:
multiply by the sign, butterflies (a + b, a - b) with strides 1, 2, 4 ... B/2, then one
multiplication by float32(1 / sqrt(B)); no fused multiply-add.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["rotate", "signs", "unrotate"]

_MASK = (1 << 64) - 1


@functools.cache
def signs(head_dim: int) -> NDArray[np.float32]:
    """The sign of each dimension: the top bit of splitmix64(d + 1), so any language can make
    it. float32 ``[head_dim]``, read-only."""
    out = np.empty(head_dim, np.float32)
    for d in range(head_dim):
        z = ((d + 1) * 0x9E3779B97F4A7C15) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        out[d] = -1.0 if (z ^ (z >> 31)) >> 63 else 1.0
    out.flags.writeable = False
    return out


def _hadamard(x: NDArray[Any]) -> NDArray[Any]:
    dim = x.shape[-1]
    block = dim & -dim
    # Dimensions first, so that each butterfly runs over all vectors at once.
    out: NDArray[Any] = x.reshape(-1, dim).T.copy()
    stride = 1
    while stride < block:
        pairs = out.reshape(dim // (2 * stride), 2, stride, -1)
        a, b = pairs[:, 0], pairs[:, 1]
        total = a + b
        np.subtract(a, b, out=b)
        a[...] = total
        stride *= 2
    out *= out.dtype.type(1 / np.sqrt(block))
    return np.ascontiguousarray(out.T).reshape(x.shape)


def rotate(x: NDArray[Any]) -> NDArray[Any]:
    """Rotate vectors ``x [..., D]``; the result has x's dtype (float32 or float64)."""
    with np.errstate(invalid="ignore", over="ignore"):
        return _hadamard(x * signs(x.shape[-1]).astype(x.dtype))


def unrotate(x: NDArray[Any]) -> NDArray[Any]:
    """Invert :func:`rotate`."""
    with np.errstate(invalid="ignore", over="ignore"):
        out: NDArray[Any] = _hadamard(x) * signs(x.shape[-1]).astype(x.dtype)
    return out
