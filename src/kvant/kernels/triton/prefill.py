"""Attention of many rows of a sequence to keys and values that were staged (FlashAttention-2).

A program has the rows of one group of 64 positions, or some of them, with all query heads of a KV
head. What was attended to in an earlier round is taken up again where it was left.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.attend import bend, power

__all__ = ["attend_rows"]


@triton.jit
def _block(
    state,
    q,
    factor,
    position,
    k_ptr,
    v_ptr,
    index,
    softcap,
    window,
    P: tl.constexpr,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """One group of keys and values added to ``state``."""
    acc, highest, norm = state
    t, d = tl.arange(0, 64), tl.arange(0, P)
    keys = tl.load(k_ptr + t[None, :] * P + d[:, None])
    scores = tl.dot(q, keys, input_precision="ieee") * factor[:, None]
    if SOFTCAP:
        scores = bend(scores, softcap) * 1.4426950408889634
    if MASKED:
        key = index * 64 + t[None, :]
        seen = (key <= position[:, None]) & ((window == 0) | (key > position[:, None] - window))
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    stand = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(scores - stand[:, None])
    shrink = tl.exp2(highest - stand)
    norm = norm * shrink + tl.sum(p, axis=1)
    values = tl.load(v_ptr + t[:, None] * P + d[None, :])
    acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return acc, higher, norm


@triton.jit(do_not_specialize=["room", "slot", "num_slots", "window"])
def attend_rows(
    q_ptr,  # [T, H, D]
    out_ptr,  # [T, H, D]
    acc_ptr,  # float32 [T, H, slots, P]
    ml_ptr,  # float32 [T, H, slots, 2]
    entries_ptr,  # [n, 8]
    k_ptr,  # [Hkv, room, 64, P]
    v_ptr,
    room,
    slot,
    num_slots,
    scale,
    softcap,
    window,
    D: tl.constexpr,
    P: tl.constexpr,
    SHARE: tl.constexpr,
    M: tl.constexpr,
    STEP: tl.constexpr,  # positions of a program
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """The rows of an entry (plan.Round) and the keys that are staged for them."""
    entry, tile, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entries_ptr += entry * 8
    shift, start, end = tl.load(entries_ptr), tl.load(entries_ptr + 1), tl.load(entries_ptr + 2)
    group, key_slot = tl.load(entries_ptr + 3), tl.load(entries_ptr + 4)
    first, last = tl.load(entries_ptr + 5), tl.load(entries_ptr + 6)
    fresh = tl.load(entries_ptr + 7)
    lowest = group * 64 + tile * STEP
    highest_position = tl.minimum(lowest + STEP, group * 64 + 64)
    if (lowest >= end) | (highest_position <= start):
        return
    m, d = tl.arange(0, M), tl.arange(0, P)
    position = lowest + m // SHARE
    there = (m < STEP * SHARE) & (position >= start) & (position < end)
    there &= position < highest_position
    heads = tl.num_programs(2) * SHARE
    begin = (lowest + shift).to(tl.int64) * heads + head * SHARE  # the rest fits 32 bits
    line = (m // SHARE) * heads + m % SHARE
    at = line[:, None] * D + d[None, :]
    inside = there[:, None] & (d < D)[None, :]
    x = tl.load(q_ptr + begin * D + at, inside, 0.0).to(tl.float32)
    up, down = power(tl.max(tl.abs(x), axis=1))
    q = (x * down[:, None]).to(k_ptr.dtype.element_ty)
    factor = up * scale
    if not SOFTCAP:
        factor *= 1.4426950408889634
    acc_ptr += (begin * num_slots + slot) * P
    ml_ptr += (begin * num_slots + slot) * 2
    place = line * num_slots
    again = there & (fresh == 0)
    where = place[:, None] * P + d[None, :]
    if DIRECT:
        highest = tl.full((M,), float("-inf"), tl.float32)
        norm = tl.zeros((M,), tl.float32)
        acc = tl.zeros((M, P), tl.float32)
    else:
        highest = tl.load(ml_ptr + place * 2, again, float("-inf"))
        norm = tl.load(ml_ptr + place * 2 + 1, again, 0.0)
        acc = tl.load(acc_ptr + where, again[:, None], 0.0)
    state = (acc, highest, norm)
    offset = (head * room + key_slot).to(tl.int64) * (64 * P)
    k_ptr += offset
    v_ptr += offset
    whole = tl.minimum(last, group)
    if WINDOW:
        first = tl.maximum(first, tl.maximum(tl.maximum(lowest, start) - window + 1, 0) // 64)
        whole = first
    for index in range(first, whole):
        k, v = k_ptr + index * (64 * P), v_ptr + index * (64 * P)
        state = _block(state, q, factor, position, k, v, index, softcap, 0, P, False, SOFTCAP)
    for index in range(tl.maximum(first, whole), last):
        k, v = k_ptr + index * (64 * P), v_ptr + index * (64 * P)
        state = _block(state, q, factor, position, k, v, index, softcap, window, P, True, SOFTCAP)
    acc, highest, norm = state
    if DIRECT:
        out = acc / norm[:, None]
        tl.store(out_ptr + begin * D + at, out.to(out_ptr.dtype.element_ty), inside)
    else:
        tl.store(acc_ptr + where, acc, there[:, None])
        tl.store(ml_ptr + place * 2, highest, there)
        tl.store(ml_ptr + place * 2 + 1, norm, there)
