"""A second, slow description of the formats, made from their docstrings and sharing no code.

Numbers are exact fractions and each rounding is spelled out, one element at a time; places in a
page are index arithmetic, one byte at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvant.formats.base import KVFormat, Side

F16_MAX = 65504
HALF_ULP = 2.0**-24  # unit roundoff of float32: fl(a op b) = (a op b)(1 + e), |e| <= HALF_ULP
TINIEST = 2.0**-150  # half the smallest float32: what a quotient can lose by underflow

HEAD_DIMS = (8, 16, 64, 80, 96, 112, 128, 192, 256)


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
    """To a finite float16, in the direction of ``how`` (math.floor or math.ceil)."""
    return _rounded(min(max(x, Fraction(-F16_MAX)), Fraction(F16_MAX)), 11, -14, how)


class Quantized(NamedTuple):
    """What is stored of one vector. ``scale`` is NaN for a vector that is not finite."""

    scale: float
    zero: float
    codes: list[int]


def quantize(vector: list[float], bits: int) -> Quantized:
    """The formulas of affine.py for one vector of float32 values."""
    levels = 2**bits - 1
    if not all(map(math.isfinite, vector)):
        return Quantized(math.nan, 0.0, [0] * len(vector))
    x = [Fraction(value) for value in vector]
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


def offsets(fmt: KVFormat, side: Side, head_dim: int) -> list[NDArray[np.int64]]:
    """Where in a part each byte of each plane is, ``[64 tokens, columns, itemsize]``."""
    planes = {  # itemsize and columns, from the docstrings of the formats
        "f32": [(4, head_dim)],
        "f16": [(2, head_dim)],
        "bf16": [(2, head_dim)],
        "int8": [(2, 0), (2, 0), (1, head_dim)],
        "int4": [(2, 0), (2, 0), (1, head_dim // 2)],
    }[fmt.name.removesuffix("h")]
    out, start = [], 0
    for itemsize, columns in planes:
        token, column, byte = np.ogrid[:64, : max(columns, 1), :itemsize]
        out.append(start + itemsize * _element(side, itemsize, columns, token, column) + byte)
        start += 64 * itemsize * max(columns, 1)
    return out
