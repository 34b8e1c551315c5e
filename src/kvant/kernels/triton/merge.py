"""Partial results of attention put together, rotated back and divided by the sums of weights."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.attend import base_pages
from kvant.kernels.triton.rotation import unrotate

__all__ = ["ROWS", "merge_rows", "merge_splits"]

ROWS = 16
"""Heads of rows that a program of :func:`merge_rows` has."""


@triton.jit
def _add(state, other):
    """Two partial results: sums ``[R, P]``, largest scores and norms ``[R]``."""
    acc, high, norm = state
    other_acc, other_high, other_norm = other
    higher = tl.maximum(high, other_high)
    stand = tl.where(higher == float("-inf"), 0.0, higher)
    weight, other_weight = tl.exp2(high - stand), tl.exp2(other_high - stand)
    acc = acc * weight[:, None] + other_acc * other_weight[:, None]
    return acc, higher, norm * weight + other_norm * other_weight


@triton.jit
def _finish(
    state,
    acc_ptr,
    ml_ptr,
    last,  # [R], where the result of finer pages is
    there,
    sink,  # [R]
    D: tl.constexpr,
    P: tl.constexpr,
    RECENT: tl.constexpr,
    UNROTATE: tl.constexpr,
    UNROTATE_FINE: tl.constexpr,
    SINKS: tl.constexpr,
):
    """What base pages gave, with what finer ones gave and the learned sinks: the outputs
    ``[R, P]``. Values of the two kinds may be rotated or not."""
    if RECENT:
        if UNROTATE and not UNROTATE_FINE:
            acc, high, norm = state
            state = unrotate(acc, D), high, norm
        high = tl.load(ml_ptr + last * 2, there, float("-inf"))
        norm = tl.load(ml_ptr + last * 2 + 1, there, 0.0)
        d = tl.arange(0, P)
        acc = tl.load(acc_ptr + last.to(tl.int64)[:, None] * P + d[None, :], there[:, None], 0.0)
        if UNROTATE_FINE and not UNROTATE:
            acc = unrotate(acc, D)
        state = _add(state, (acc, high, norm))
    acc, high, norm = state
    if SINKS:
        score = sink * 1.4426950408889634
        higher = tl.maximum(high, score)
        weight = tl.exp2(high - higher)
        acc = acc * weight[:, None]
        norm = norm * weight + tl.exp2(score - higher)
    if UNROTATE and (UNROTATE_FINE or not RECENT):
        acc = unrotate(acc, D)
    return acc / norm[:, None]


@triton.jit(do_not_specialize=["num_slots", "window"])
def merge_splits(
    out_ptr,  # [T, H, D]
    acc_ptr,  # float32 [S, H, slots, P]
    ml_ptr,  # float32 [S, H, slots, 2]
    rows_ptr,  # [S]
    positions_ptr,
    sinks_ptr,  # float32 [H]
    num_slots,
    window,
    D: tl.constexpr,
    P: tl.constexpr,
    NUM_SINK: tl.constexpr,
    RECENT: tl.constexpr,
    UNROTATE: tl.constexpr,
    UNROTATE_FINE: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The splits of one head of a decode; with ``RECENT`` the last slot is that of finer pages.
    The order of sums is that of 64 splits, however many there are."""
    sequence, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.load(rows_ptr + sequence)
    if row < 0:
        return
    first, end, pages = base_pages(tl.load(positions_ptr + row), window, NUM_SINK, RECENT)
    count = (tl.maximum(end - first, 0) + pages - 1) // pages
    begin = (sequence * heads + head) * num_slots
    slot, d = tl.arange(0, 64), tl.arange(0, P)
    there = slot < count
    highs = tl.load(ml_ptr + (begin + slot) * 2, there, float("-inf"))
    norms = tl.load(ml_ptr + (begin + slot) * 2 + 1, there, 0.0)
    at = (begin + slot).to(tl.int64)[:, None] * P + d[None, :]
    parts = tl.load(acc_ptr + at, there[:, None], 0.0)
    high = tl.max(highs, axis=0, keep_dims=True)
    weights = tl.exp2(highs - tl.where(high == float("-inf"), 0.0, high))
    norm = tl.sum(norms * weights, axis=0, keep_dims=True)
    acc = tl.sum(parts * weights[:, None], axis=0, keep_dims=True)
    one = tl.arange(0, 1)
    last, sink = begin + num_slots - 1 + one, tl.load(sinks_ptr + head + one)
    out = _finish(
        (acc, high, norm),
        acc_ptr,
        ml_ptr,
        last,
        one == 0,
        sink,
        D,
        P,
        RECENT,
        UNROTATE,
        UNROTATE_FINE,
        SINKS,
    )
    at = (row.to(tl.int64) * heads + head) * D + d[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), d[None, :] < D)


@triton.jit(do_not_specialize=["num_rows", "heads", "window"])
def merge_rows(
    out_ptr,  # [T, H, D]
    acc_ptr,  # float32 [T, H, slots, P]
    ml_ptr,  # float32 [T, H, slots, 2]
    rows_ptr,  # [n]
    positions_ptr,
    sinks_ptr,  # float32 [H]
    num_rows,
    heads,
    window,
    R: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    NUM_SINK: tl.constexpr,
    RECENT: tl.constexpr,
    UNROTATE: tl.constexpr,
    UNROTATE_FINE: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Rows of prompts: slot 0 is of base pages, if the row sees any, slot 1 of finer ones."""
    line = tl.program_id(0) * R + tl.arange(0, R)
    there = line < num_rows * heads
    row = tl.load(rows_ptr + line // heads, there, 0)
    first, end, _ = base_pages(tl.load(positions_ptr + row, there, 0), window, NUM_SINK, RECENT)
    slots: tl.constexpr = 2 if RECENT else 1
    head, d = line % heads, tl.arange(0, P)
    place = (row * heads + head) * slots
    seen = there & (first < end)
    high = tl.load(ml_ptr + place * 2, seen, float("-inf"))
    norm = tl.load(ml_ptr + place * 2 + 1, seen, 0.0)
    acc = tl.load(acc_ptr + place.to(tl.int64)[:, None] * P + d[None, :], seen[:, None], 0.0)
    sink = tl.load(sinks_ptr + head)
    out = _finish(
        (acc, high, norm),
        acc_ptr,
        ml_ptr,
        place + slots - 1,
        there,
        sink,
        D,
        P,
        RECENT,
        UNROTATE,
        UNROTATE_FINE,
        SINKS,
    )
    at = (row.to(tl.int64) * heads + head)[:, None] * D + d[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), there[:, None] & (d < D)[None, :])
