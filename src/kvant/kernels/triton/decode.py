"""Tokens of a page as float32, exactly what ``KVFormat.dequantize`` gives."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["codes_at", "decode_tokens", "element", "values_at"]


@triton.jit
def decode_tokens(part, tokens, PART: tl.constexpr):
    """Tokens ``[R]`` of the part at ``part``, of a format by token: float32 ``[R, P]``, still
    rotated; columns from head_dim on are 0."""
    t, d = tokens[:, None], tl.arange(0, PART.padded_dim)[None, :]
    there = (t >= 0) & (d < PART.head_dim)
    if PART.family == "plain":
        x = values_at(part, t, d, there, PART)
    else:
        x = tl.where(there, _coded(part, t, d, there, PART), 0.0)
    return x


@triton.jit
def _coded(part, t, d, there, PART: tl.constexpr):
    codes = codes_at(part, t, d, there, PART)
    scale = _scalar(part + PART.scale, t)
    if PART.family == "midpoint":
        x = scale * (codes.to(tl.float32) - (2 ** (PART.bits - 1) - 0.5))
    elif PART.family == "float8":  # the upper bits of a float16, over 256
        bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)
        x = scale * (bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0)
    else:
        x = scale * codes.to(tl.float32) + _scalar(part + PART.zero, t)
    return x


@triton.jit
def codes_at(part, t, d, there, PART: tl.constexpr):
    """Codes of dimensions ``d`` of tokens ``t``, int32, byte by byte; 0 where none is ``there``."""
    codes = _plane(part, t, d, there, PART, 0)
    if len(PART.widths) == 2:
        codes |= _plane(part, t, d, there, PART, 1) << PART.widths[0]
    return codes


@triton.jit
def _scalar(plane, t):
    return tl.load(plane.to(tl.pointer_type(tl.float16)) + t).to(tl.float32)


@triton.jit
def _plane(part, t, d, there, PART: tl.constexpr, PLANE: tl.constexpr):
    """The bits of codes that a plane has."""
    WIDTH: tl.constexpr = PART.widths[PLANE]
    COLUMNS: tl.constexpr = PART.columns[PLANE]
    at = element(t, d % COLUMNS, 4, PART, PLANE)
    byte = tl.load(part + PART.codes[PLANE] + at, there, 0).to(tl.int32)
    return (byte >> ((d // COLUMNS) * WIDTH)) & (2**WIDTH - 1)


@triton.jit
def values_at(part, t, d, there, PART: tl.constexpr):
    """The same of a format without codes, float32."""
    values = part + PART.codes[0]
    at = element(t, d, 32 // PART.bits, PART, 0)
    if PART.dtype == "f32":
        x = tl.load(values.to(tl.pointer_type(tl.float32)) + at, there, 0.0)
    elif PART.dtype == "f16":
        x = tl.load(values.to(tl.pointer_type(tl.float16)) + at, there, 0.0).to(tl.float32)
    else:
        bits = tl.load(values.to(tl.pointer_type(tl.int16)) + at, there, 0).to(tl.int32)
        x = (bits << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def element(t, c, WORD: tl.constexpr, PART: tl.constexpr, PLANE: tl.constexpr):
    """Where in a plane column c of a token is, in elements of which 4 bytes hold WORD."""
    if PART.side == "k":
        word = (t // 16) * (PART.columns[PLANE] // WORD) + c // WORD
        at = (word * 16 + t % 16) * WORD + c % WORD
    else:
        BLOCK: tl.constexpr = PART.block[PLANE]
        if WORD == 4:
            line, place = (t // 16) * 4 + (t % 8) // 2, ((t % 16) // 8) * 2 + t % 2
        else:
            line, place = t // WORD, t % WORD
        word = ((c // BLOCK) * (64 // WORD) + line) * BLOCK + c % BLOCK
        at = word * WORD + place
    return at
