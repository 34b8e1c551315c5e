"""Tiles of vectors as the bytes of their formats: formats/*.py, bit for bit.

A tile is float32 ``[R, P]``, in the domain in which the format stores vectors; P is the padded
head_dim D, and columns from D on are 0. Launch kernels that use this with
``enable_fp_fusion=False``: no product may be fused with a sum.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.decode import element

__all__ = ["extent", "join_extents", "store_channels", "store_tokens"]


@triton.jit
def store_tokens(part, slots, x, here, PART: tl.constexpr):
    """Encode tokens ``x [R, P]`` into positions ``slots [R]`` of parts whose first bytes are at
    ``part``, one pointer or ``[R, 1]``, where ``here [R]``; of a format by token."""
    t, here = slots[:, None], here[:, None]
    if PART.family == "plain":
        _store_rows(part, t, _plain(x, PART), here, PART, 0)
    elif PART.family == "midpoint":
        scale, codes = _midpoint(x, PART.bits, PART.head_dim)
        _store_scalar(part + PART.scale, t, scale, here)
        _store_codes(part, t, codes, here, PART)
    elif PART.family == "float8":
        scale, codes = _float8(x)
        _store_scalar(part + PART.scale, t, scale, here)
        _store_codes(part, t, codes, here, PART)
    else:
        low, high, largest = _extent_of_tokens(x, PART.head_dim)
        scale, zero, finite = _grid(low, high, largest, PART.bits)
        _store_scalar(part + PART.scale, t, _marked(scale, finite), here)
        _store_scalar(part + PART.zero, t, zero.to(tl.float16), here)
        _store_codes(part, t, _affine(x, scale, zero, finite, PART.bits), here, PART)


@triton.jit
def store_channels(part, slots, x, found, is_first, PART: tl.constexpr):
    """Encode tokens ``x [R, P]`` of a page into the part at ``part``, of a format by page. The page
    has one extent, ``found``; scales and zeros are stored if ``is_first``."""
    low, high, largest = found
    scale, zero, finite = _grid(low, high, largest, PART.bits)
    d = tl.arange(0, PART.padded_dim)[None, :]
    there = is_first & (d < PART.head_dim)
    _store_scalar(part + PART.scale, d, _marked(scale, finite), there)
    _store_scalar(part + PART.zero, d, zero.to(tl.float16), there)
    if PART.head_dim % 32 != 0:  # planes of the page end with zeros
        d = PART.head_dim + tl.arange(0, 32)
        behind = is_first & (d < (PART.zero - PART.scale) // 2)
        nothing = tl.zeros((32,), tl.float16)
        _store_scalar(part + PART.scale, d, nothing, behind)
        _store_scalar(part + PART.zero, d, nothing, behind)
    t = slots[:, None]
    _store_codes(part, t, _affine(x, scale, zero, finite, PART.bits), t >= 0, PART)


# --------------------------------------------------------------------------------------------------
# plain.py


@triton.jit
def _plain(x, PART: tl.constexpr):
    """The bits of numbers, int32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = _magnitude(x)
    if PART.dtype == "f16":
        finite = magnitude < 0x7F800000
        half = _clamped(tl.where(finite, x, 0.0)).to(tl.float16).to(tl.int16, bitcast=True)
        broken = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00 | ((bits >> 16) & 0x8000))
        bits = tl.where(finite, half.to(tl.int32) & 0xFFFF, broken)
    elif PART.dtype == "bf16":
        carry = ((bits & 0xFFFF) + ((bits >> 16) & 1) + 0x7FFF) >> 16
        bits = tl.where(magnitude > 0x7F800000, 0x7FC0, ((bits >> 16) + carry) & 0xFFFF)
    return bits


@triton.jit
def _clamped(x):
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0)


# --------------------------------------------------------------------------------------------------
# affine.py


@triton.jit
def extent(x):
    """Of channels, ``x [R, P]``: minima and maxima ``[1, P]``, and the largest bits of an absolute
    value, which tell whether all are finite; if they are not, the others mean nothing."""
    magnitude = _magnitude(x)
    x = tl.where(magnitude < 0x7F800000, x, 0.0)
    low, high = tl.min(x, 0, keep_dims=True), tl.max(x, 0, keep_dims=True)
    return low, high, tl.max(magnitude, 0, keep_dims=True)


@triton.jit
def join_extents(a, b):
    """The extent of the tokens of both."""
    return tl.minimum(a[0], b[0]), tl.maximum(a[1], b[1]), tl.maximum(a[2], b[2])


@triton.jit
def _extent_of_tokens(x, D: tl.constexpr):
    """The same of tokens, ``[R, 1]``."""
    magnitude = _magnitude(x)
    low = tl.where(magnitude < 0x7F800000, x, 0.0)
    high = low
    if x.shape[1] != D:
        there = tl.arange(0, x.shape[1])[None, :] < D
        low, high = tl.where(there, low, float("inf")), tl.where(there, low, float("-inf"))
    low, high = tl.min(low, 1, keep_dims=True), tl.max(high, 1, keep_dims=True)
    return low, high, tl.max(magnitude, 1, keep_dims=True)


@triton.jit
def _magnitude(x):
    """The bits of absolute values; those of Inf and NaN are the largest."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _all_finite(x):
    """Of tokens, ``[R, 1]``."""
    return tl.max(_magnitude(x), 1, keep_dims=True) < 0x7F800000


@triton.jit
def _grid(low, high, largest, BITS: tl.constexpr):
    """Scales and zeros of groups, float32, and whether groups are finite."""
    LEVELS: tl.constexpr = 2**BITS - 1
    finite = largest < 0x7F800000
    low, high = tl.where(finite, low, 0.0), tl.where(finite, high, 0.0)
    zero = _f16_down(low)
    # rounding up is rounding the negative down; 0 - 0 is +0
    span = tl.maximum(high - zero, 0.0)
    scale = 0.0 - _f16_down(tl.div_rn(0.0 - span, tl.full(span.shape, LEVELS, tl.float32)))
    return scale, zero, finite


@triton.jit
def _affine(x, scale, zero, finite, BITS: tl.constexpr):
    """Codes, int32 like ``x``."""
    LEVELS: tl.constexpr = 2**BITS - 1
    steps = tl.where(finite, x, 0.0) - zero
    steps = tl.div_rn(steps, tl.broadcast_to(tl.where(scale > 0.0, scale, 1.0), x.shape))
    return tl.where(finite, _rint(tl.minimum(tl.maximum(steps, 0.0), LEVELS + 0.0)), 0)


@triton.jit
def _f16_down(x):
    """Largest finite float16 <= x (or -65504), as float32; +0 for either zero."""
    half = _clamped(x).to(tl.float16)
    bits = half.to(tl.int16, bitcast=True).to(tl.int32)
    next_down = tl.where(bits > 0, bits - 1, tl.where((bits & 0x7FFF) == 0, -0x7FFF, bits + 1))
    lower = next_down.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    half = half.to(tl.float32)
    return tl.maximum(tl.where(half > x, lower, half), -65504.0) + 0.0


@triton.jit
def _rint(x):
    """Integers nearest to ``x`` in [0, 2^22), half to even: at 2^23 floats are integers."""
    return (x + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000


@triton.jit
def _marked(scale, finite):
    """Scales as float16: NaN where a group is not finite."""
    bits = scale.to(tl.float16).to(tl.int16, bitcast=True)
    return tl.where(finite, bits, 0x7E00).to(tl.int16).to(tl.float16, bitcast=True)


# --------------------------------------------------------------------------------------------------
# midpoint.py


@triton.jit
def _midpoint(x, BITS: tl.constexpr, D: tl.constexpr):
    """Scales (float16 ``[R, 1]``) and codes (int32)."""
    HALF: tl.constexpr = 2 ** (BITS - 1)
    finite = _all_finite(x)
    x = tl.where(finite, x, 0.0)
    largest = tl.max(tl.abs(x), 1, keep_dims=True)
    best = _clipped(largest, 0, HALF)
    least = _error(x, best, HALF, D)
    for clip in range(1, 8):
        scale = _clipped(largest, clip, HALF)
        error = _error(x, scale, HALF, D)
        best = tl.where(error < least, scale, best)
        least = tl.minimum(error, least)
    return _marked(best, finite), tl.where(finite, _codes(x, best, HALF), 0)


@triton.jit
def _clipped(largest, clip, HALF: tl.constexpr):
    """The scale of a clip, a float16 as float32. Products with powers of two are as exact as
    divisions."""
    scale = ((16 - clip) * 0.0625 * largest) * (1 / HALF)
    return tl.minimum(scale, 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _codes(x, scale, HALF: tl.constexpr):
    step = tl.where(scale > 0.0, scale, 1.0)
    level = tl.div_rn(x, tl.broadcast_to(step, x.shape))
    level = tl.minimum(tl.maximum(level, -HALF + 0.0), HALF + 0.0)
    code = level.to(tl.int32)  # towards 0; tl.floor takes tiny numbers for 0
    code = tl.where(code.to(tl.float32) > level, code - 1, code) + HALF
    return tl.minimum(code, 2 * HALF - 1)


@triton.jit
def _error(x, scale, HALF: tl.constexpr, D: tl.constexpr):
    """The sum of squared errors, ``[R, 1]``."""
    error = scale * (_codes(x, scale, HALF).to(tl.float32) - (HALF - 0.5)) - x
    return _folded_sum(error * error, D)


@triton.constexpr_function
def _num_folds(dim):
    return (dim & -dim).bit_length() - 1


@triton.jit
def _folded_sum(x, D: tl.constexpr):
    """Numbers at or above 0, folded on themselves while their count is even, then added in order:
    ``[R, 1]``."""
    R: tl.constexpr = x.shape[0]
    P: tl.constexpr = x.shape[1]
    if P == D:
        for fold in tl.static_range(_num_folds(D)):
            x = tl.sum(tl.reshape(x, (R, 2, D >> (fold + 1))), 1)  # two numbers have one order
    else:
        d = tl.arange(0, P)[None, :]
        for fold in tl.static_range(_num_folds(D)):
            other = tl.minimum(d + (D >> (fold + 1)), P - 1)
            x += tl.gather(x, tl.broadcast_to(other, (R, P)), 1)  # the first half counts
        total = _column(x, 0)
        for index in tl.static_range(1, D >> _num_folds(D)):
            total += _column(x, index)
        x = total
    return x


@triton.jit
def _column(x, INDEX: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == INDEX, x, 0.0), 1, keep_dims=True)


# --------------------------------------------------------------------------------------------------
# float8.py


@triton.jit
def _float8(x):
    """Scales (float16 ``[R, 1]``) and codes (int32)."""
    finite = _all_finite(x)
    x = tl.where(finite, x, 0.0)
    largest = tl.max(tl.abs(x), 1, keep_dims=True)
    scale = 0.0 - _f16_down(tl.div_rn(0.0 - largest, tl.full(largest.shape, 448.0, tl.float32)))
    step = tl.where(scale > 0.0, scale, 1.0)
    codes = _e4m3(tl.div_rn(x, tl.broadcast_to(step, x.shape)))
    return _marked(scale, finite), tl.where(finite, codes, 0)


@triton.jit
def _e4m3(x):
    """The bits of numbers, to nearest even, int32."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    return sign | tl.where(size < 0.015625, _rint(size * 512.0), normal)


# --------------------------------------------------------------------------------------------------
# packing.py and base.py


@triton.jit
def _store_scalar(plane, at, half, mask):
    tl.store(plane.to(tl.pointer_type(tl.float16)) + at, half, mask)


@triton.jit
def _store_codes(part, t, codes, here, PART: tl.constexpr):
    if len(PART.widths) == 2:
        low: tl.constexpr = PART.widths[0]
        _store_rows(part, t, _pack(codes, low, PART), here, PART, 0)
        _store_rows(part, t, _pack(codes >> low, PART.widths[1], PART), here, PART, 1)
    else:
        _store_rows(part, t, _pack(codes, PART.widths[0], PART), here, PART, 0)


@triton.jit
def _pack(codes, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Low bits of codes as bytes, int32 ``[R, columns]``, columns a power of two at or above those
    of the plane."""
    R: tl.constexpr = codes.shape[0]
    P: tl.constexpr = codes.shape[1]
    D: tl.constexpr = PART.head_dim
    FIELDS: tl.constexpr = 8 // WIDTH
    codes = codes & (2**WIDTH - 1)
    if FIELDS == 1:
        packed = codes
    elif P == D and P >= 4 * FIELDS:
        fields = tl.reshape(codes, (R, FIELDS, P // FIELDS))
        packed = _joined(fields, tl.arange(0, FIELDS)[None, :, None] * WIDTH, 1)
    else:
        COLUMNS: tl.constexpr = (D * WIDTH + 31) // 32 * 4
        d = tl.arange(0, triton.next_power_of_2(COLUMNS))[None, :]
        packed = tl.zeros((R, triton.next_power_of_2(COLUMNS)), tl.int32)
        for field in tl.static_range(FIELDS):
            found = tl.gather(codes, tl.broadcast_to(tl.minimum(d, P - 1), packed.shape), 1)
            packed |= tl.where(d < D, found, 0) << (field * WIDTH)
            d += COLUMNS
    return packed


@triton.jit
def _joined(fields, shifts, AXIS: tl.constexpr):
    """Fields of bits that do not overlap in one number."""
    # Sums of integers are wider in the interpreter.
    return tl.sum(fields << shifts, AXIS).to(tl.int64).to(tl.int32)


@triton.jit
def _store_rows(part, t, elements, here, PART: tl.constexpr, PLANE: tl.constexpr):
    """Rows of elements, int32 ``[R, columns or more]``, as those of tokens ``t [R, 1]``."""
    R: tl.constexpr = elements.shape[0]
    N: tl.constexpr = elements.shape[1]
    COLUMNS: tl.constexpr = PART.columns[PLANE]
    BITS: tl.constexpr = PART.bits if PART.family == "plain" else 8
    WORD: tl.constexpr = 32 // BITS  # elements of 4 bytes
    plane = part + PART.codes[PLANE]
    if PART.side == "k":
        word = tl.arange(0, N // WORD)[None, :]
        at = ((t // 16) * (COLUMNS // WORD) + word) * 16 + t % 16
        if WORD > 1:
            elements = tl.reshape(elements, (R, N // WORD, WORD))
            elements = _joined(elements, tl.arange(0, WORD)[None, None, :] * BITS, 2)
        there = word < COLUMNS // WORD
        tl.store(plane.to(tl.pointer_type(tl.int32)) + at, elements, here & there)
    else:
        c = tl.arange(0, N)[None, :]
        at, there = element(t, c, WORD, PART, PLANE), c < COLUMNS
        if WORD == 4:
            tl.store(plane + at, elements.to(tl.uint8), here & there)
        elif WORD == 2:
            plane = plane.to(tl.pointer_type(tl.int16))
            tl.store(plane + at, elements.to(tl.int16), here & there)
        else:
            tl.store(plane.to(tl.pointer_type(tl.int32)) + at, elements, here & there)
