"""The randomized Hadamard rotation of :mod:`kvant.formats.hadamard`, of rows of a tile.

Rows are float32 ``[R, P]``, P the padded head_dim D. Blocks of the rotation divide D, so what is
behind it stays there. A sum is always one of two numbers: the bits are those of the format.
"""

# mypy: ignore-errors
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from kvant.formats import hadamard
from kvant.kernels.triton.layout import padded

__all__ = ["rotate", "rotate_rows", "tile_rows", "unrotate"]

# The signs of more dimensions than heads have, as bits of words of 32; 1 is -1.
_SIGNS = tl.constexpr(
    tuple(np.packbits(hadamard.signs(512) < 0, bitorder="little").view("<u4").tolist())
)


def rotate_rows(x: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate vectors ``x [N, D]`` of floats, dense in their last dimension, or undo it; float32."""
    rows, dim = x.shape
    out = torch.empty((rows, dim), dtype=torch.float32, device=x.device)
    size = tile_rows(rows)
    if rows:
        _rotate_rows[(triton.cdiv(rows, size),)](
            x, out, rows, x.stride(0), dim, padded(dim), size, inverse, enable_fp_fusion=False
        )
    return out


def tile_rows(rows: int) -> int:
    """How many of so many vectors a program works on."""
    if knobs.runtime.interpret:
        return 64  # the interpreter takes as long for one number as for many
    return 4 if rows <= 256 else 16


@triton.jit(do_not_specialize=["rows"])
def _rotate_rows(
    x,
    out,
    rows,
    stride,
    D: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    INVERSE: tl.constexpr,
):
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    d = tl.arange(0, P)[None, :]
    there = (row < rows) & (d < D)
    tile = tl.load(x + row * stride + d, there, 0.0).to(tl.float32)
    if INVERSE:
        tile = unrotate(tile, D)
    else:
        tile = rotate(tile, D)
    tl.store(out + row * D + d, tile, there)


@triton.jit
def rotate(x, D: tl.constexpr):
    """What ``hadamard.rotate`` makes of rows ``x [R, P]``."""
    return _butterflies(_signed(x, D), D)


@triton.jit
def unrotate(x, D: tl.constexpr):
    """Invert :func:`rotate`."""
    return _signed(_butterflies(x, D), D)


@triton.jit
def _signed(x, D: tl.constexpr):
    """``x`` times the signs: a bit of each number."""
    d = tl.arange(0, x.shape[1])
    word = tl.zeros((x.shape[1],), tl.uint32)
    for index in tl.static_range((D + 31) // 32):
        word = tl.where(d // 32 == index, _SIGNS[index], word).to(tl.uint32)
    sign = ((word >> (d % 32).to(tl.uint32)) << 31).to(tl.int32, bitcast=True)
    return (x.to(tl.int32, bitcast=True) ^ sign[None, :]).to(tl.float32, bitcast=True)


@triton.jit
def _butterflies(x, D: tl.constexpr):
    for step in tl.static_range(_num_strides(D)):
        x = _butterfly(x, 1 << step)
    return x * (D & -D) ** -0.5


@triton.constexpr_function
def _num_strides(dim):
    return (dim & -dim).bit_length() - 1


@triton.jit
def _butterfly(x, STRIDE: tl.constexpr):
    """(a + b, a - b) of columns STRIDE apart. The partner of a number is found as the sum of both,
    as integers, less itself: that takes one shuffle, and no memory."""
    R: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, (R, P // (2 * STRIDE), 2, STRIDE))
    bits = pairs.to(tl.int32, bitcast=True)
    partner = tl.sum(bits, 2, keep_dims=True) - bits
    # Sums of integers are wider in the interpreter.
    partner = partner.to(tl.int64).to(tl.int32).to(tl.float32, bitcast=True)
    first = tl.arange(0, 2)[None, None, :, None] == 0
    return tl.reshape(tl.where(first, pairs + partner, partner - pairs), (R, P))
