"""A second, slow description of the formats, made from their docstrings and sharing no code.

Numbers are exact fractions and each rounding is spelled out, one element at a time; places in a
page are index arithmetic, one byte at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvant.formats.base import KVFormat, Side

F16_MAX = 65504
F32_MAX = Fraction(2**24 - 1) * 2**104
HALF_ULP = 2.0**-24  # unit roundoff of float32: fl(a op b) = (a op b)(1 + e), |e| <= HALF_ULP
TINIEST = 2.0**-150  # half the smallest float32: what a quotient can lose by underflow

HEAD_DIMS = (8, 16, 64, 80, 96, 112, 128, 192, 256)

# Codes of so many bits: the fields they are cut into, lowest bits first.
FIELDS = {8: [8], 6: [4, 2], 5: [4, 1], 4: [4], 3: [2, 1], 2: [2]}


def _rounded(x: Fraction, digits: int, emin: int, how: Callable[[Fraction], int]) -> Fraction:
    """Round to ``digits`` significant bits with least normal exponent ``emin``."""
    if x == 0:
        return x
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    if Fraction(2) ** exponent > abs(x):
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, emin) - digits + 1)
    return how(x / ulp) * ulp


def f32(x: Fraction) -> Fraction:
    """To the nearest float32, ties to even (``round`` of a Fraction is half to even)."""
    return _rounded(x, 24, -126, round)


def f16(x: Fraction, how: Callable[[Fraction], int]) -> Fraction:
    """To a finite float16, in the direction of ``how`` (math.floor, math.ceil, or round)."""
    return _rounded(min(max(x, Fraction(-F16_MAX)), Fraction(F16_MAX)), 11, -14, how)


class Quantized(NamedTuple):
    """What is stored of one group. ``scale`` is NaN for a group that is not finite."""

    scale: float
    zero: float
    codes: list[int]


def quantize(group: list[float], bits: int) -> Quantized:
    """The formulas of affine.py for one group of float32 values."""
    levels = 2**bits - 1
    if not all(map(math.isfinite, group)):
        return Quantized(math.nan, 0.0, [0] * len(group))
    x = [Fraction(value) for value in group]
    zero = f16(min(x), math.floor)
    scale = max(f16(f32(f32(max(x) - zero) / levels), math.ceil), Fraction(0))
    codes = []
    for value in x:
        steps = f32(f32(value - zero) / scale) if scale else Fraction(0)
        codes.append(min(max(round(steps), 0), levels))
    return Quantized(float(scale), float(zero), codes)


def dequantize(stored: Quantized) -> list[float]:
    """One multiply-add with a single rounding, or NaN throughout."""
    if math.isnan(stored.scale):
        return [math.nan] * len(stored.codes)
    scale, zero = Fraction(stored.scale), Fraction(stored.zero)
    return [float(f32(scale * code + zero)) for code in stored.codes]


Sum = Fraction | float  # a sum of squares in float32: a float only where it is infinite


def _capped(x: Sum) -> Sum:
    """A sum of squares rounded to float32, which overflows to infinity."""
    if x == math.inf or f32(Fraction(x)) > F32_MAX:
        return math.inf
    return f32(Fraction(x))


def _folded(terms: list[Sum]) -> Sum:
    """Added on itself while even, then in order; each sum is rounded."""
    while len(terms) % 2 == 0:
        half = len(terms) // 2
        terms = [_capped(terms[i] + terms[i + half]) for i in range(half)]
    total = terms[0]
    for term in terms[1:]:
        total = _capped(total + term)
    return total


class Midpointed(NamedTuple):
    """What midpoint.py stores of one rotated vector, and at which clip factor, in sixteenths."""

    scale: float
    codes: list[int]
    sixteenths: int


def midpoint(vector: list[float], bits: int) -> Midpointed:
    """The formulas of midpoint.py for one vector of float32 values that is already rotated."""
    if not all(map(math.isfinite, vector)):
        return Midpointed(math.nan, [0] * len(vector), 16)
    half = 2 ** (bits - 1)
    x = [Fraction(value) for value in vector]
    best: tuple[Sum, Midpointed] | None = None
    for sixteenths in range(16, 8, -1):
        largest = f32(Fraction(sixteenths, 16) * max(map(abs, x)))
        scale = f16(f32(largest / half), round)
        codes = [
            min(max(math.floor(f32(value / (scale or 1))) + half, 0), 2 * half - 1) for value in x
        ]
        errors = [
            f32(scale * (code - Fraction(2 * half - 1, 2)) - value)
            for code, value in zip(codes, x, strict=True)
        ]
        total = _folded([_capped(error * error) for error in errors])
        if best is None or total < best[0]:
            best = total, Midpointed(float(scale), codes, sixteenths)
    assert best is not None
    return best[1]


def from_midpoints(stored: Midpointed, bits: int) -> list[float]:
    """Exact products; NaN throughout for a vector that was not finite."""
    centre = 2 ** (bits - 1) - 0.5
    return [stored.scale * (code - centre) for code in stored.codes]


# Numbers of e4m3 by code, the sign aside: 3 bits of mantissa below 4 of exponent; the last is NaN.
E4M3 = [
    (Fraction(code % 8, 8) + (code >= 8)) * Fraction(2) ** (max(code // 8, 1) - 7)
    for code in range(127)
]


class Floated(NamedTuple):
    """What float8.py stores of one vector."""

    scale: float
    codes: list[int]


def float8(vector: list[float]) -> Floated:
    """The formulas of float8.py for one vector of float32 values."""
    if not all(map(math.isfinite, vector)):
        return Floated(math.nan, [0] * len(vector))
    scale = f16(f32(max(Fraction(abs(value)) for value in vector) / E4M3[-1]), math.ceil)
    codes = []
    for value in vector:
        size = min(f32(abs(Fraction(value)) / (scale or 1)), E4M3[-1])
        sign = math.copysign(1, value) < 0
        codes.append(128 * sign + E4M3.index(_rounded(size, 4, -6, round)))
    return Floated(float(scale), codes)


def row_bytes(width: int, head_dim: int) -> int:
    """Bytes of a vector in a plane of fields of this width: whole words of 4."""
    count = math.ceil(head_dim * width / 8)
    while count % 4:
        count += 1
    return count


def packed(codes: list[int], bits: int) -> list[list[int]]:
    """The bytes of a vector's codes, plane by plane, one field at a time (packing.py)."""
    planes, shift = [], 0
    for width in FIELDS[bits]:
        row = [0] * row_bytes(width, len(codes))
        for dimension, code in enumerate(codes):
            field, byte = divmod(dimension, len(row))
            row[byte] += (code >> shift) % 2**width << field * width
        planes.append(row)
        shift += width
    return planes


def hadamard(vector: list[float]) -> list[float]:
    """Butterflies of strides 1, 2, 4 ... over blocks, each operation rounded to float32."""
    dim = len(vector)
    block = math.gcd(dim, 2**20)
    x = [Fraction(value) for value in vector]
    stride = 1
    while stride < block:
        for low in range(dim):
            if low // stride % 2 == 0:
                a, b = x[low], x[low + stride]
                x[low], x[low + stride] = f32(a + b), f32(a - b)
        stride *= 2
    factor = f32(Fraction(1 / math.sqrt(block)))
    return [float(f32(value * factor)) for value in x]


def _element(side: Side, itemsize: int, columns: int, token: Any, column: Any) -> Any:
    """Which element of a plane belongs to a token and column (columns 0: one scalar a token)."""
    if columns == 0:
        return token + column
    word = 4 // itemsize
    if side == "k":
        line = token // 16 * (columns // word) + column // word
        return (line * 16 + token % 16) * word + column % word
    block = math.gcd(16, columns)
    if itemsize == 1:  # word j of 16 tokens: 2j, 2j+1, 2j+8, 2j+9
        token_word = token // 16 * 4 + token % 8 // 2
        in_word = token % 16 // 8 * 2 + token % 2
    else:
        token_word, in_word = token // word, token % word
    line = column // block * (64 // word) + token_word
    return (line * block + column % block) * word + in_word


class Map(NamedTuple):
    """The planes of a format, from the docstrings: columns of float16 numbers for the page, and
    (itemsize, columns) of what each token has."""

    page_columns: list[int]
    token_planes: list[tuple[int, int]]


def byte_map(fmt: KVFormat, head_dim: int) -> Map:
    """What a part of this format is made of."""
    plain = {"f32": 4, "f16": 2, "bf16": 2}
    if fmt.name in plain:
        return Map([], [(plain[fmt.name], head_dim)])
    if fmt.name == "fp8":
        return Map([], [(2, 0), (1, head_dim)])
    match = re.fullmatch(r"int(\d)([hcm]?)", fmt.name)
    assert match is not None
    bits, variant = int(match[1]), match[2]
    codes = [(1, row_bytes(width, head_dim)) for width in FIELDS[bits]]
    if variant == "c":
        return Map([head_dim, head_dim], codes)
    return Map([], [(2, 0)] * (1 if variant == "m" else 2) + codes)


def offsets(fmt: KVFormat, side: Side, head_dim: int) -> list[NDArray[np.int64]]:
    """Where in a part each byte of each plane is: ``[64 tokens, columns, itemsize]``, and
    ``[1, columns, 2]`` of planes of the page, whose columns are filled up to 64 bytes."""
    page_columns, token_planes = byte_map(fmt, head_dim)
    out, start = [], 0
    for columns in page_columns:
        lines = math.ceil(2 * columns / 64)
        out.append(start + np.arange(64 * lines).reshape(1, -1, 2))
        start += 64 * lines
    for itemsize, columns in token_planes:
        token, column, byte = np.ogrid[:64, : max(columns, 1), :itemsize]
        out.append(start + itemsize * _element(side, itemsize, columns, token, column) + byte)
        start += 64 * itemsize * max(columns, 1)
    return out
