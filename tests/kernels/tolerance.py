"""How far a backend that computes with codes as integers may be from the truth.

A decoded vector is ``scale * code + rest`` with a centred code, ``c - 2^(bits - 1)``. Products
with the codes are sums of integers, and exact, but their other operand is rounded first. For
(Lq, Lp) = ``arithmetic(format)``, 0 where the format is computed in float32:

    keys     u = q * scale is rounded to multiples of max |u| / Lq, the maximum over the dimensions
    values   w = p * scale is rounded to multiples of max w / Lp, the maximum over those of the 64
             tokens of a page that the query sees

A scale by token is no part of u, it multiplies the product; a scale by channel is no part of w.
Everything else is float32: the rest, sums over pages, the softmax and its denominator.

A rounding is off by at most half a step, and by step / sqrt(12) on average (where w is below half
a step, by w). That is all that :func:`rounding` uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvant.formats import KVFormat, packing
from tests.kernels.attention_oracle import (
    GROUP,
    QKV,
    Array,
    Attended,
    LayerFormats,
    Options,
    Piece,
    Table,
    by_query_head,
    encode_groups,
    pieces,
)

Arithmetic = Callable[[KVFormat], tuple[int, int]]


def float32_only(fmt: KVFormat) -> tuple[int, int]:
    return 0, 0


def arithmetic_of(backend: str) -> Arithmetic:
    """How a backend computes with a format."""
    if backend != "cpu":
        return float32_only
    from kvant.kernels.cpu import arithmetic

    out: Arithmetic = arithmetic
    return out


class Codes(NamedTuple):
    """What a format keeps of ``x [N, Hkv, D]``, of each query head and page: centred codes
    ``[H, pages, 64, D]``, and scales ``[H, pages, 64, 1]`` or by channel ``[H, pages, 1, D]``."""

    code: Array
    scale: Array

    @classmethod
    def of(cls, fmt: KVFormat, x: Array, heads: int) -> Codes:
        scale, *others = encode_groups(fmt, x)
        packed = others[-len(packing.WIDTHS[fmt.bits]) :]
        code = packing.unpack(packed, fmt.bits, x.shape[-1]).astype(np.float32)
        code -= 1 << fmt.bits - 1
        scale = np.expand_dims(scale.astype(np.float32), -2 if fmt.by_page else -1)
        return cls(*(by_query_head(each.swapaxes(0, 1), heads) for each in (code, scale)))


class Rounding(NamedTuple):
    """Of the length of the error of an output vector ``[N, H]``: a bound that always holds, and
    the root of its mean square, infinite where score errors are too large to know it. Both 0 if
    all is float32."""

    worst: Array
    typical: Array


def rounding(
    formats: LayerFormats, qkv: QKV, options: Options, truth: Attended, arithmetic: Arithmetic
) -> Rounding:
    """What the roundings do to attention whose exact result is ``truth``.

    Scores that are off by e change an output by sum p e (v - out) to first order, and by at most
    sum p (exp |e| - 1) |v - out| / sum p exp -|e|; or not more than between any two outputs. The
    errors of different keys come from the same roundings of q, but weighed with keys and values
    that have nothing to do with each other: their squares add up.
    """
    q, k, v = qkv
    seen = pieces(formats, k, v, options.window)
    if not any(arithmetic(piece.k_format)[0] + arithmetic(piece.v_format)[1] for piece in seen):
        return Rounding(*np.zeros((2, *q.shape[:2])))
    queries, out = q.swapaxes(0, 1), truth.out.swapaxes(0, 1)
    p, slope = _by_page(truth.weights), _by_page(truth.slope)
    to_sink = np.maximum(1 - _sum(p), 0)
    worst_score, score_variance, distance = (np.zeros_like(p) for _ in range(3))
    for piece in seen:
        visible = _by_page(piece.visible) > 0
        if limit := arithmetic(piece.k_format)[0]:
            worst, variance = _of_scores(piece, queries, limit)
            worst_score = np.where(visible, worst, worst_score)
            score_variance = np.where(visible, variance * slope**2, score_variance)
        distance = np.where(visible, _distance(piece, out), distance)
    hull = np.maximum(distance.max(axis=(2, 3)), np.linalg.norm(out, axis=-1))
    certain = worst_score.max(axis=(2, 3)) < 10  # else any key may count, if it is seen
    growth = np.exp(np.minimum(worst_score, 10))
    total = _sum(p / growth) + to_sink
    shift = _sum(p * (growth - 1) * distance) / total
    bound = np.where(certain, np.minimum(shift, hull), hull)
    highest = np.where(certain, 1 / total, np.inf)[..., None, None] * np.maximum(p * growth, 1e-30)
    highest = np.minimum(highest, 1)
    mean_square = _sum(p**2 * score_variance * distance**2)
    for piece in seen:
        if limit := arithmetic(piece.v_format)[1]:
            visible = _by_page(piece.visible) > 0
            bound += _sum(np.prod(_of_weights(piece, highest * visible, limit, 0.5), axis=0))
            typical = np.prod(_of_weights(piece, p * visible, limit, 12**-0.5), axis=0)
            mean_square += _sum(typical**2)
    small = score_variance.max(axis=(2, 3)) < 0.05**2
    return Rounding(bound.T, np.where(small, np.sqrt(mean_square), np.inf).T)


def _of_scores(piece: Piece, q: Array, limit: int) -> tuple[Array, Array]:
    """Bounds and variances of the errors of scores of ``q [H, N, D]``: ``[H, N, pages, 64]``."""
    codes = Codes.of(piece.k_format, piece.k, len(q))
    u = np.abs(piece.k_format.rotate(q))
    if piece.k_format.by_page:
        largest = (u[:, :, None] * codes.scale[:, None, :, 0]).max(axis=-1)[..., None]
    else:
        largest = u.max(axis=-1)[..., None, None] * codes.scale[:, None, ..., 0]
    step = largest / limit * q.shape[-1] ** -0.5
    size, square = np.abs(codes.code).sum(axis=-1), np.square(codes.code).sum(axis=-1)
    return step / 2 * size[:, None], step**2 / 12 * square[:, None]


def _of_weights(piece: Piece, p: Array, limit: int, part: float) -> tuple[Array, Array]:
    """For weights ``p [H, N, pages, 64]``, 0 where a key is not seen: how far a rounded weight is
    off, ``part`` of a step; and the length of what it multiplies."""
    codes = Codes.of(piece.v_format, piece.v, len(p))
    w, vectors = p, codes.code
    if piece.v_format.by_page:
        vectors = vectors * codes.scale
    else:
        w = p * codes.scale[:, None, ..., 0]
    step = w.max(axis=-1, keepdims=True) / limit
    length = np.linalg.norm(vectors, axis=-1)[:, None]
    return np.minimum(part * step, w), np.broadcast_to(length, w.shape)


def _distance(piece: Piece, out: Array) -> Array:
    """From each output ``[H, N, D]`` to each value: ``[H, N, pages, 64]``."""
    v = Table.of(piece.v_format, piece.v, len(out), float, rotated=False).vectors
    square = np.square(v).sum(axis=-1)[:, None] + np.square(out).sum(axis=-1)[..., None]
    return _by_page(np.sqrt(np.maximum(square - 2 * out @ v.swapaxes(1, 2), 0)))


def _by_page(x: Array) -> Array:
    """``x [..., N]`` as float32 ``[..., pages, 64]``, zeros behind."""
    out = np.zeros((*x.shape[:-1], -(-x.shape[-1] // GROUP) * GROUP), np.float32)
    out[..., : x.shape[-1]] = x
    return out.reshape(*x.shape[:-1], -1, GROUP)


def _sum(x: Array) -> Array:
    """Over all keys."""
    out: Array = x.sum(axis=(-2, -1))
    return out
