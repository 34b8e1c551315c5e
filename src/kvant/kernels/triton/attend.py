"""Attention of sequences with one row: their contexts are cut into splits that work at the same
time (Flash-Decoding), each on all query heads of a KV head, so that a code is converted once.

Dot products are of codes, as float16, with queries and attention weights; scales and offsets are
applied to the products. So that no product leaves float16's range, rows of queries and the scales
of a page are divided by powers of two first, which costs no bit. Splits are decided by positions
alone, and so is the order of every sum: a row's result does not depend on the batch.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.codec import bias, channel_scales, key_tile, token_scales, value_tile

__all__ = ["attend_split", "base_pages", "bend", "power"]


@triton.jit
def power(x):
    """The power of two at or below each ``x >= 0``, float32, and what it must be multiplied by to
    be 1."""
    exponent = tl.minimum(tl.maximum(x.to(tl.int32, bitcast=True) >> 23, 1), 253)
    down = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return (exponent << 23).to(tl.float32, bitcast=True), down


@triton.jit
def bend(x, cap):
    """``cap * tanh(x / cap)``, by a series near 0, where the exponential would lose digits."""
    y = x / cap
    y2 = y * y
    near = y * (1 + y2 * (-1 / 3 + y2 * (2 / 15 + y2 * (-17 / 315 + y2 * (62 / 2835)))))
    far = 1 - 2 / (tl.exp(2 * y) + 1)
    return cap * tl.where(tl.abs(y) < 0.25, near, far)


@triton.jit
def base_pages(position, window, NUM_SINK: tl.constexpr, RECENT: tl.constexpr):
    """First and end of the groups that a query sees in base pages, and how many of them make a
    split; ``window`` 0 is none."""
    end = position // 64
    if not RECENT:
        end += 1
    first = tl.where(window > 0, tl.maximum(position - window + 1, 0) // 64, 0)
    first = tl.maximum(first, NUM_SINK)
    count = tl.maximum(end - first, 0)
    return first, end, tl.maximum((count + 63) // 64, 4)


@triton.jit
def _scores(q, rounded, total, excess, part, K: tl.constexpr, TYPE: tl.constexpr):
    """Products of queries ``q [M, P]``, float32, of elements below 2, with the keys of a page:
    ``[M, 64]``. ``rounded`` are the same as ``TYPE``; ``total [M]`` is the sum of each, ``excess``
    the bias times that of what is rounded."""
    keys = key_tile(part, K, TYPE)
    if K.by_page:
        scale, offset = channel_scales(part, K)
        up, down = power(tl.max(tl.where(scale == scale, scale, 0.0), axis=0))
        weighed = (q * (scale * down)[None, :]).to(TYPE)
        dots = tl.dot(weighed, keys, input_precision="ieee") * up
        rest = q * offset[None, :] - weighed.to(tl.float32) * (bias(K, TYPE) * up)
        dots += tl.sum(rest, axis=1)[:, None]
    else:
        dots = tl.dot(rounded, keys, input_precision="ieee")
        if K.family != "plain":
            scale, offset = token_scales(part, K)
            dots = (dots - excess[:, None]) * scale[None, :]
            if K.family != "float8":
                dots += total[:, None] * offset[None, :]
    return dots


@triton.jit
def _mix(acc, p, seen, part, V: tl.constexpr, TYPE: tl.constexpr):
    """``acc [M, P]`` plus the values of a page, each times its weight ``p [M, 64]``. What is not
    ``seen [64]`` may be anything; its weights are 0."""
    values = value_tile(part, V, TYPE)
    BIAS: tl.constexpr = bias(V, TYPE)
    if V.family == "plain":
        values = tl.where(seen[:, None], values, 0.0).to(TYPE)
        acc = tl.dot(p.to(TYPE), values, acc, input_precision="ieee")
    elif V.by_page:
        scale, offset = channel_scales(part, V)
        rounded = p.to(TYPE)
        dots = tl.dot(rounded, values, input_precision="ieee")
        dots -= tl.sum(rounded.to(tl.float32), axis=1)[:, None] * BIAS
        acc += dots * scale[None, :] + tl.sum(p, axis=1)[:, None] * offset[None, :]
    else:
        scale, offset = token_scales(part, V)
        scale, offset = tl.where(seen, scale, 0.0), tl.where(seen, offset, 0.0)
        up, down = power(tl.max(tl.where(scale == scale, scale, 0.0), axis=0))
        weighed = (p * (scale * down)[None, :]).to(TYPE)
        rest = p * offset[None, :] - weighed.to(tl.float32) * (BIAS * up)
        acc += tl.dot(weighed, values, input_precision="ieee") * up
        if V.family != "float8":
            acc += tl.sum(rest, axis=1)[:, None]
    return acc


@triton.jit(do_not_specialize=["table_width", "slot", "num_slots", "window"])
def attend_split(
    q_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D]
    acc_ptr,  # float32 [S, H, slots, P]
    ml_ptr,  # float32 [S, H, slots, 2]
    rows_ptr,
    positions_ptr,
    table_ptr,  # [S, table_width], or with FINE [S, 2]
    table_width,
    pool_ptr,
    page_bytes,
    layer_offset,
    slot,
    num_slots,
    scale,
    softcap,
    window,
    K: tl.constexpr,
    V: tl.constexpr,
    K_TYPE: tl.constexpr,
    V_TYPE: tl.constexpr,
    SHARE: tl.constexpr,  # query heads of a KV head
    M: tl.constexpr,  # the same, padded
    NUM_SINK: tl.constexpr,
    RECENT: tl.constexpr,
    FINE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """A split of a context in base pages; or, if ``FINE``, the sink's page and that of the query's
    own group. If it is ``DIRECT`` there is nothing else, and the result goes to ``out_ptr``; else a
    sum of weighted values, and the largest score and the sum of weights, go to ``slot`` and on."""
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + sequence)
    if row < 0:
        return
    position = tl.load(positions_ptr + row)
    if FINE:
        first, end = tl.where((position >= 64) & (NUM_SINK > 0), 0, 1), 2
    else:
        low, high, pages = base_pages(position, window, NUM_SINK, RECENT)
        first = low + split * pages
        end = tl.minimum(first + pages, high)
        if first >= end:
            return
    P: tl.constexpr = K.padded_dim
    heads = tl.num_programs(1) * SHARE
    m, d = tl.arange(0, M), tl.arange(0, P)
    there = (m < SHARE)[:, None] & (d < K.head_dim)[None, :]
    at = (row.to(tl.int64) * heads + head * SHARE + m)[:, None] * K.head_dim + d[None, :]
    q = tl.load(q_ptr + at, there, 0.0).to(tl.float32)
    up, down = power(tl.max(tl.abs(q), axis=1))
    q *= down[:, None]
    rounded = q.to(K_TYPE)
    total, excess = tl.sum(q, axis=1), tl.sum(rounded.to(tl.float32), axis=1) * bias(K, K_TYPE)
    factor = up * scale
    if not SOFTCAP:
        factor *= 1.4426950408889634
    highest = tl.full((M,), float("-inf"), tl.float32)
    norm = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, P), tl.float32)
    for index in range(first, end):
        page = tl.load(table_ptr + sequence * table_width + index).to(tl.int64)
        part = pool_ptr + page * page_bytes + layer_offset + head * (K.nbytes + V.nbytes)
        group = index
        if FINE:
            group = index * (position // 64)
        key = group * 64 + tl.arange(0, 64)
        seen = (key <= position) & ((window == 0) | (key > position - window))
        scores = _scores(q, rounded, total, excess, part, K, K_TYPE) * factor[:, None]
        if SOFTCAP:
            scores = bend(scores, softcap) * 1.4426950408889634
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        stand = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet
        p = tl.exp2(scores - stand[:, None])
        shrink = tl.exp2(highest - stand)
        norm = norm * shrink + tl.sum(p, axis=1)
        acc = _mix(acc * shrink[:, None], p, seen, part + K.nbytes, V, V_TYPE)
        highest = higher
    if DIRECT:
        out = acc / norm[:, None]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), there)
    else:
        place = (sequence * heads + head * SHARE + m) * num_slots + slot + split
        where = place.to(tl.int64)[:, None] * P + d[None, :]
        tl.store(acc_ptr + where, acc, (m < SHARE)[:, None])
        tl.store(ml_ptr + place * 2, highest, m < SHARE)
        tl.store(ml_ptr + place * 2 + 1, norm, m < SHARE)
