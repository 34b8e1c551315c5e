"""Pages read as tiles: 64 tokens of a part as ``[P, 64]`` (K) or ``[64, P]`` (V), P the padded
head_dim.

With a scale and a zero a code stands for ``scale * centred + offset``, where ``centred = code -
2^(bits - 1)`` and ``offset = zero + scale * 2^(bits - 1)``. Products with centred codes are as
accurate as those with the numbers that they stand for. As float16 a tile has ``centred + bias``:
its bits are 0x6400 + code, those of 1024 + code, two codes at a time. The bias is not taken off the
codes but off the products, which are float32: ``bias`` times the sum of what was multiplied.

Where head_dim is a power of two a page is read in words of 4 bytes, in the order of its bytes, and
taken apart in registers; else byte by byte.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.decode import codes_at, values_at

__all__ = ["bias", "channel_scales", "key_tile", "token_scales", "value_tile"]


@triton.constexpr_function
def bias(PART, TYPE):
    """By how much a tile of codes is more than centred codes."""
    if TYPE != tl.float16 or PART.family in ("plain", "float8"):
        return 0.0
    return 1024.0 + 2 ** (PART.bits - 1)


@triton.constexpr_function
def _raised(PART, TYPE):
    """What is put before the bits of a code."""
    return 0x6400 if TYPE == tl.float16 and PART.family != "float8" else 0


@triton.jit
def token_scales(part, PART: tl.constexpr):
    """Scale and offset of each token, float32 ``[64]``; of a format of codes by token."""
    t = tl.arange(0, 64)
    scale = tl.load((part + PART.scale).to(tl.pointer_type(tl.float16)) + t).to(tl.float32)
    if PART.family == "affine":
        zero = tl.load((part + PART.zero).to(tl.pointer_type(tl.float16)) + t).to(tl.float32)
        offset = zero + scale * (2 ** (PART.bits - 1))
    elif PART.family == "midpoint":
        offset = scale * 0.5
    else:
        offset = scale * 0.0
    return scale, offset


@triton.jit
def channel_scales(part, PART: tl.constexpr):
    """Scale and offset of each dimension, float32 ``[P]``; of a format by page."""
    d = tl.arange(0, PART.padded_dim)
    there = d < PART.head_dim
    scale = tl.load((part + PART.scale).to(tl.pointer_type(tl.float16)) + d, there, 0.0)
    zero = tl.load((part + PART.zero).to(tl.pointer_type(tl.float16)) + d, there, 0.0)
    scale = scale.to(tl.float32)
    return scale, zero.to(tl.float32) + scale * (2 ** (PART.bits - 1))


@triton.jit
def key_tile(part, PART: tl.constexpr, TYPE: tl.constexpr):
    """Centred codes plus the bias, or values of a format without codes: ``[P, 64]``, ``TYPE``."""
    FAST: tl.constexpr = PART.head_dim == PART.padded_dim and PART.head_dim >= 64
    t, d = tl.arange(0, 64), tl.arange(0, PART.padded_dim)
    if PART.family == "plain":
        if FAST:
            tile = _plain_keys(part, PART).to(TYPE)
        else:
            tile = values_at(part, t[None, :], d[:, None], d[:, None] < PART.head_dim, PART).to(
                TYPE
            )
    else:
        if FAST:
            codes = _key_fields(part, PART, 0, _raised(PART, TYPE))
            if len(PART.widths) == 2:
                codes = codes | (_key_fields(part, PART, 1, 0) << PART.widths[0])
        else:
            codes = codes_at(part, t[None, :], d[:, None], d[:, None] < PART.head_dim, PART)
            codes = codes.to(tl.int16) | _raised(PART, TYPE)
        tile = _floats(codes, PART, TYPE)
    return tile


@triton.jit
def value_tile(part, PART: tl.constexpr, TYPE: tl.constexpr):
    """The same, ``[64, P]``."""
    FAST: tl.constexpr = PART.head_dim == PART.padded_dim and PART.head_dim >= 64
    t, d = tl.arange(0, 64), tl.arange(0, PART.padded_dim)
    if PART.family == "plain":
        if FAST:
            tile = _plain_values(part, PART).to(TYPE)
        else:
            tile = values_at(part, t[:, None], d[None, :], d[None, :] < PART.head_dim, PART).to(
                TYPE
            )
    else:
        if FAST:
            codes = _value_fields(part, PART, 0, _raised(PART, TYPE))
            if len(PART.widths) == 2:
                codes = codes | (_value_fields(part, PART, 1, 0) << PART.widths[0])
        else:
            codes = codes_at(part, t[:, None], d[None, :], d[None, :] < PART.head_dim, PART)
            codes = codes.to(tl.int16) | _raised(PART, TYPE)
        tile = _floats(codes, PART, TYPE)
    return tile


@triton.jit
def _floats(codes, PART: tl.constexpr, TYPE: tl.constexpr):
    """Integers as ``TYPE``. Those of dimensions that do not exist stay harmless: queries are 0
    there and outputs are not stored."""
    if PART.family == "float8":  # sign, 4 bits of exponent, 3 of mantissa: a float16's, over 256
        bits = codes.to(tl.int32)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        tile = (bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0).to(TYPE)
    elif TYPE == tl.float16:
        tile = codes.to(tl.float16, bitcast=True)
    else:
        tile = codes.to(TYPE) - 2 ** (PART.bits - 1)
    return tile


@triton.jit
def _key_fields(part, PART: tl.constexpr, PLANE: tl.constexpr, RAISED: tl.constexpr):
    """One plane of codes, int16 ``[P, 64]``."""
    WORDS: tl.constexpr = PART.columns[PLANE] // 4
    words = tl.load((part + PART.codes[PLANE]).to(tl.pointer_type(tl.int32)) + _key_words(WORDS))
    words = tl.reshape(words, (WORDS, 64))
    if PART.widths[PLANE] == 8:
        x = _bytes(words, 0xFF, RAISED)  # [word, t, byte % 2, byte // 2]
        x = tl.permute(x, (0, 3, 2, 1))
    elif PART.widths[PLANE] == 4:
        x = _bytes(tl.join(words, words >> 4), 0x0F, RAISED)
        x = tl.permute(x, (2, 0, 4, 3, 1))
    elif PART.widths[PLANE] == 2:
        x = tl.join(tl.join(words, words >> 2), tl.join(words >> 4, words >> 6))
        x = tl.permute(_bytes(x, 0x03, RAISED), (3, 2, 0, 5, 4, 1))
    else:
        low = tl.join(tl.join(words, words >> 1), tl.join(words >> 2, words >> 3))
        x = _bytes(tl.join(low, low >> 4), 0x01, RAISED)
        x = tl.permute(x, (4, 3, 2, 0, 6, 5, 1))
    return tl.reshape(x, (PART.padded_dim, 64))


@triton.jit
def _key_words(WORDS: tl.constexpr):
    """Where the words of a plane of K are: word of a token, 16 tokens, token of these. (Written
    with the remainder of a token's number, 16 bytes would not be seen to lie side by side.)"""
    word, token = tl.arange(0, WORDS)[:, None, None], tl.arange(0, 16)[None, None, :]
    return tl.arange(0, 4)[None, :, None] * (WORDS * 16) + word * 16 + token


@triton.jit
def _value_fields(part, PART: tl.constexpr, PLANE: tl.constexpr, RAISED: tl.constexpr):
    """One plane of codes, int16 ``[64, P]``. A word has tokens 0, 1, 8, 9 from its first on."""
    COLUMNS: tl.constexpr = PART.columns[PLANE]
    BLOCK: tl.constexpr = PART.block[PLANE]
    a, j = tl.arange(0, 4)[:, None, None], tl.arange(0, 4)[None, :, None]
    c = tl.arange(0, COLUMNS)[None, None, :]
    at = ((c // BLOCK) * 16 + a * 4 + j) * BLOCK + c % BLOCK
    words = tl.load((part + PART.codes[PLANE]).to(tl.pointer_type(tl.int32)) + at)
    if PART.widths[PLANE] == 8:
        x = _bytes(words, 0xFF, RAISED)  # [a, j, c, byte % 2, byte // 2]
        x = tl.permute(x, (0, 4, 1, 3, 2))
    elif PART.widths[PLANE] == 4:
        x = _bytes(tl.join(words, words >> 4), 0x0F, RAISED)
        x = tl.permute(x, (0, 5, 1, 4, 3, 2))
    elif PART.widths[PLANE] == 2:
        x = tl.join(tl.join(words, words >> 2), tl.join(words >> 4, words >> 6))
        x = tl.permute(_bytes(x, 0x03, RAISED), (0, 6, 1, 5, 4, 3, 2))
    else:
        low = tl.join(tl.join(words, words >> 1), tl.join(words >> 2, words >> 3))
        x = _bytes(tl.join(low, low >> 4), 0x01, RAISED)
        x = tl.permute(x, (0, 7, 1, 6, 5, 4, 3, 2))
    return tl.reshape(x, (64, PART.padded_dim))


@triton.jit
def _bytes(words, MASK: tl.constexpr, RAISED: tl.constexpr):
    """The low bits of each byte, int16, in two new last axes: byte % 2, byte // 2. Two bytes of a
    word are worked on at once."""
    even = (words & (MASK * 0x10001)) | (RAISED * 0x10001)
    odd = ((words >> 8) & (MASK * 0x10001)) | (RAISED * 0x10001)
    pairs = tl.join(even, odd)
    return tl.join(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))


@triton.jit
def _halves(words, PART: tl.constexpr):
    """Two floats of 16 bits from each word, in a new last axis."""
    x = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    if PART.dtype == "f16":
        floats = x.to(tl.float16, bitcast=True)
    else:
        floats = x.to(tl.bfloat16, bitcast=True)
    return floats


@triton.jit
def _plain_keys(part, PART: tl.constexpr):
    WORDS: tl.constexpr = PART.head_dim * PART.bits // 32
    at = _key_words(WORDS)
    if PART.dtype == "f32":
        values = tl.load((part + PART.codes[0]).to(tl.pointer_type(tl.float32)) + at)
        values = tl.reshape(values, (PART.head_dim, 64))
    else:
        words = tl.load((part + PART.codes[0]).to(tl.pointer_type(tl.int32)) + at)
        words = tl.reshape(words, (WORDS, 64))
        values = tl.reshape(tl.permute(_halves(words, PART), (0, 2, 1)), (PART.head_dim, 64))
    return values


@triton.jit
def _plain_values(part, PART: tl.constexpr):
    WORDS: tl.constexpr = 64 * PART.bits // 32
    word, c = tl.arange(0, WORDS)[:, None], tl.arange(0, PART.head_dim)[None, :]
    at = ((c // 16) * WORDS + word) * 16 + c % 16
    if PART.dtype == "f32":
        values = tl.load((part + PART.codes[0]).to(tl.pointer_type(tl.float32)) + at)
    else:
        words = tl.load((part + PART.codes[0]).to(tl.pointer_type(tl.int32)) + at)
        values = tl.reshape(tl.permute(_halves(words, PART), (0, 2, 1)), (64, PART.head_dim))
    return values
