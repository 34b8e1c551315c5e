"""The verb ``write``: new tokens into pages, and pages that became full into their own formats.

The bytes are those of the reference backend: kernels are launched without fused multiply-adds.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvant.formats import PAGE_TOKENS
from kvant.kernels.triton.decode import decode_tokens
from kvant.kernels.triton.encode import extent, join_extents, store_channels, store_tokens
from kvant.kernels.triton.layout import Store
from kvant.kernels.triton.rotation import rotate, tile_rows, unrotate

__all__ = ["fill_pages", "rope_and_write", "write_rows"]


def write_rows(
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    row_pages: Tensor,
    fine: Store,
    scratch: Store | None,
    num_recent: int,
    layer: int,
) -> None:
    """Encode ``k, v [T, Hkv, D]`` of any float type, whose rows are dense, into pages.

    Args:
        positions: integers ``[T]``; a token's place in its page is ``position % 64``.
        row_pages: int32 ``[T]``, a page of ``fine`` or, from ``num_recent`` on, of ``scratch`` if
            there is one; a row with -1 is not written.
        layer: its formats are those of ``fine.layers[layer]``.
    """
    _launch(k, k, v, (), positions, row_pages, fine, scratch, num_recent, layer, k)


def rope_and_write(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    row_pages: Tensor,
    fine: Store,
    scratch: Store | None,
    num_recent: int,
    layer: int,
    q_out: Tensor,
) -> None:
    """Rotate queries and keys by their positions; write keys and values, give back queries.

    Args:
        qkv: ``[T, (heads + 2 * kv_heads) * D]`` of any float type, rows dense: queries, keys,
            values.
        cos, sin: float32 ``[positions, D / 2]``, dense; see :meth:`kvant.models.ops.Ops.rope`.
        q_out: dense ``[T, heads, D]``; computed for every row, also of those that are not written.

    The others are those of :func:`write_rows`.
    """
    parts = qkv.unflatten(1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), 1)
    tables = cos, sin
    _launch(*parts, tables, positions, row_pages, fine, scratch, num_recent, layer, q_out)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: tuple[Tensor, ...],
    positions: Tensor,
    row_pages: Tensor,
    fine: Store,
    scratch: Store | None,
    num_recent: int,
    layer: int,
    q_out: Tensor,
) -> None:
    rows, kv_heads, _ = k.shape
    heads = q.shape[1] if tables else 0
    cos, sin = tables or (positions, positions)
    other = fine if scratch is None else scratch
    formats = fine.layers[layer]
    size = tile_rows(rows)
    if not rows:
        return
    _write_rows[(triton.cdiv(rows, size), heads + 2 * kv_heads)](
        q,
        k,
        v,
        q_out,
        cos,
        sin,
        positions,
        row_pages,
        fine.pages,
        other.pages,
        rows,
        num_recent,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        fine.page_bytes,
        other.page_bytes,
        formats.offset,
        other.layers[layer].offset,
        formats.k,
        formats.v,
        heads,
        kv_heads,
        scratch is not None,
        size,
        enable_fp_fusion=False,
    )


@triton.jit(
    do_not_specialize=["rows", "num_recent"],
    do_not_specialize_on_alignment=["positions", "row_pages"],
)
def _write_rows(
    q,
    k,
    v,
    q_out,
    cos,
    sin,
    positions,
    row_pages,
    fine,
    scratch,
    rows,
    num_recent,
    q_stride,
    k_stride,
    v_stride,
    fine_bytes,
    scratch_bytes,
    fine_offset,
    scratch_offset,
    K: tl.constexpr,
    V: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    SCRATCH: tl.constexpr,
    R: tl.constexpr,
):
    """One program has R rows of one head: of queries, of keys or of values."""
    D: tl.constexpr = K.head_dim
    P: tl.constexpr = K.padded_dim
    head = tl.program_id(1)
    row = tl.program_id(0) * R + tl.arange(0, R)
    here = row < rows
    position = tl.load(positions + row, here, 0)
    if head < HEADS:
        x = _rotated(q + head * D, q_stride, cos, sin, row, position, here, D, P)
        _store_queries(q_out + head * D, x, row, here, HEADS * D, D)
    else:
        page = tl.load(row_pages + row, here, -1).to(tl.int64)
        first = fine + fine_offset + page * fine_bytes
        if SCRATCH:
            there = scratch + scratch_offset + (page - num_recent) * scratch_bytes
            first = tl.where(page < num_recent, first, there)
        here = here & (page >= 0)
        slot = (position % 64).to(tl.int32)
        head -= HEADS
        if head < KV_HEADS:
            part = first + head * (K.nbytes + V.nbytes)
            if HEADS:
                x = _rotated(k + head * D, k_stride, cos, sin, row, position, here, D, P)
            else:
                x = _rows(k + head * D, k_stride, row, here, 0, D, P)
            _encode_rows(part, slot, x, here, K)
        else:
            head -= KV_HEADS
            part = first + (head * (K.nbytes + V.nbytes) + K.nbytes)
            x = _rows(v + head * D, v_stride, row, here, 0, D, P)
            _encode_rows(part, slot, x, here, V)


@triton.jit
def _encode_rows(part, slot, x, here, PART: tl.constexpr):
    if PART.rotated:
        x = rotate(x, PART.head_dim)
    store_tokens(part[:, None], slot, x, here, PART)


@triton.jit
def _rows(x, stride, row, here, FIRST: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """Vectors as float32 ``[R, P]``, from the dimension FIRST on, and around; 0 behind the last."""
    d = tl.arange(0, P)[None, :]
    at = row.to(tl.int64)[:, None] * stride + (d + FIRST) % D
    return tl.load(x + at, here[:, None] & (d < D), 0.0).to(tl.float32)


@triton.jit
def _rotated(x, stride, cos, sin, row, position, here, D: tl.constexpr, P: tl.constexpr):
    """Vectors after RoPE."""
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, P)[None, :]
    at, there = position.to(tl.int64)[:, None] * HALF + d % HALF, here[:, None] & (d < D)
    along = _rows(x, stride, row, here, 0, D, P) * tl.load(cos + at, there, 0.0)
    across = _rows(x, stride, row, here, HALF, D, P) * tl.load(sin + at, there, 0.0)
    return tl.where(d < HALF, along - across, along + across)


@triton.jit
def _store_queries(out, x, row, here, stride, D: tl.constexpr):
    d = tl.arange(0, x.shape[1])[None, :]
    at = row.to(tl.int64)[:, None] * stride + d
    tl.store(out + at, x.to(out.dtype.element_ty), here[:, None] & (d < D))


def fill_pages(
    fills: Tensor, recent: Store, scratch: Store, base: Store, num_recent: int, layer: int
) -> None:
    """Encode full pages of the finer formats into those of ``base``.

    Args:
        fills: int32 ``[F, 2]``: a page of ``recent`` or, from ``num_recent`` on, of ``scratch``,
            and the page of ``base`` that it becomes; a row with -1 is nothing.
    """
    source, target = recent.layers[layer], base.layers[layer]
    last = base.layers[-1]
    kv_heads = (base.page_bytes - last.offset) // last.head_bytes
    tokens = tile_rows(PAGE_TOKENS * len(fills))
    if not len(fills):
        return
    _fill_pages[(len(fills), 2 * kv_heads, PAGE_TOKENS // tokens)](
        fills,
        recent.pages,
        scratch.pages,
        base.pages,
        num_recent,
        recent.page_bytes,
        scratch.page_bytes,
        base.page_bytes,
        source.offset,
        scratch.layers[layer].offset,
        target.offset,
        source.k,
        source.v,
        target.k,
        target.v,
        kv_heads,
        tokens,
        num_warps=8 if target.k.padded_dim > 128 else 4,
        enable_fp_fusion=False,
    )


@triton.jit(
    do_not_specialize=["num_recent"],
    do_not_specialize_on_alignment=["fills"],
)
def _fill_pages(
    fills,
    recent,
    scratch,
    base,
    num_recent,
    recent_bytes,
    scratch_bytes,
    base_bytes,
    recent_offset,
    scratch_offset,
    base_offset,
    FINE_K: tl.constexpr,
    FINE_V: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KV_HEADS: tl.constexpr,
    R: tl.constexpr,
):
    """One program has R tokens of a part of one head."""
    fine_page = tl.load(fills + 2 * tl.program_id(0)).to(tl.int64)
    base_page = tl.load(fills + 2 * tl.program_id(0) + 1).to(tl.int64)
    if (fine_page >= 0) & (base_page >= 0):
        source = recent + recent_offset + fine_page * recent_bytes
        if fine_page >= num_recent:
            source = scratch + scratch_offset + (fine_page - num_recent) * scratch_bytes
        target = base + base_offset + base_page * base_bytes
        head = tl.program_id(1)
        if head < KV_HEADS:
            source += head * (FINE_K.nbytes + FINE_V.nbytes)
            target += head * (K.nbytes + V.nbytes)
            _fill_part(source, target, FINE_K, K, R)
        else:
            head -= KV_HEADS
            source += head * (FINE_K.nbytes + FINE_V.nbytes) + FINE_K.nbytes
            target += head * (K.nbytes + V.nbytes) + K.nbytes
            _fill_part(source, target, FINE_V, V, R)


@triton.jit
def _fill_part(source, target, FINE: tl.constexpr, PART: tl.constexpr, R: tl.constexpr):
    tokens = tl.program_id(2) * R + tl.arange(0, R)
    x = _converted(source, tokens, FINE, PART)
    if PART.by_page:
        found = extent(x)
        for first in range(0, 64, R):
            page = extent(_converted(source, first + tl.arange(0, R), FINE, PART))
            found = join_extents(found, page)
        store_channels(target, tokens, x, found, tl.program_id(2) == 0, PART)
    else:
        store_tokens(target, tokens, x, tokens >= 0, PART)


@triton.jit
def _converted(source, tokens, FINE: tl.constexpr, PART: tl.constexpr):
    """Tokens of a page, in the domain of another format."""
    x = decode_tokens(source, tokens, FINE)
    if FINE.rotated:
        x = unrotate(x, FINE.head_dim)
    if PART.rotated:
        x = rotate(x, PART.head_dim)
    return x
