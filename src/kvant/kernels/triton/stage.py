"""Pages decoded into rows, for kernels that multiply many queries with them: what a code stands for
is found once for all queries of a step, not once for each tile of them."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from kvant.kernels.triton.codec import channel_scales, key_tile, token_scales, value_tile

__all__ = ["stage_pages"]


@triton.jit
def _values(tile, part, PART: tl.constexpr, KEYS: tl.constexpr, TYPE: tl.constexpr):
    """What a tile of codes stands for, as ``TYPE``; float16 saturates."""
    if PART.family == "plain":
        x = tile
    else:
        if PART.by_page:
            scale, offset = channel_scales(part, PART)
        else:
            scale, offset = token_scales(part, PART)
        if KEYS == PART.by_page:  # the scale of a row of the tile
            x = tile * scale[:, None] + offset[:, None]
        else:
            x = tile * scale[None, :] + offset[None, :]
        if TYPE == tl.float16:
            x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(TYPE)


@triton.jit(do_not_specialize=["num_recent", "window"])
def stage_pages(
    k_ptr,  # [Hkv, slots, 64, P]
    v_ptr,
    stage_ptr,  # [slots, 3]
    pool_ptr,
    page_bytes,
    layer_offset,
    scratch_ptr,
    scratch_bytes,
    num_recent,
    window,
    K: tl.constexpr,
    V: tl.constexpr,
    K_TYPE: tl.constexpr,
    V_TYPE: tl.constexpr,
    FINE: tl.constexpr,
):
    """Decode K and V of a page of one KV head into a slot, as their formats store them (rotated or
    not). A page that no query's window reaches is left out. A token whose value is not finite gets
    a key of NaN and a value of 0: it reaches the rows that see it, and not those it is masked for
    (0 * NaN would)."""
    slot, head, slots = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    page = tl.load(stage_ptr + slot * 3).to(tl.int64)
    group, start = tl.load(stage_ptr + slot * 3 + 1), tl.load(stage_ptr + slot * 3 + 2)
    if (window > 0) & (group * 64 + 63 <= start - window):
        return
    part = pool_ptr + page * page_bytes + layer_offset
    if FINE:
        there = scratch_ptr + (page - num_recent) * scratch_bytes
        part = tl.where(page >= num_recent, there, part)
    part += head * (K.nbytes + V.nbytes)
    t, d = tl.arange(0, 64), tl.arange(0, K.padded_dim)
    place = (head * slots + slot).to(tl.int64) * 64 * K.padded_dim
    V_READ: tl.constexpr = V_TYPE if V.family == "plain" else tl.float32
    v_part = part + K.nbytes
    values = _values(value_tile(v_part, V, V_READ), v_part, V, False, V_TYPE)
    broken = tl.where(tl.abs(values.to(tl.float32)) < float("inf"), 0, 1)
    broken = tl.max(broken, axis=1) > 0
    values = tl.where(broken[:, None], tl.zeros((1, 1), V_TYPE), values)
    tl.store(v_ptr + place + t[:, None] * K.padded_dim + d[None, :], values)
    K_READ: tl.constexpr = K_TYPE if K.family == "plain" else tl.float32
    keys = _values(key_tile(part, K, K_READ), part, K, True, K_TYPE)
    nothing = tl.full((1, 1), float("nan"), tl.float32).to(K_TYPE)
    keys = tl.where(broken[None, :], nothing, keys)
    tl.store(k_ptr + place + t[None, :] * K.padded_dim + d[:, None], keys)
