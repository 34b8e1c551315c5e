"""The byte map of a part: whose is each byte, what stands in it, and how many there are."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from kvant.formats import FORMATS, PAGE_TOKENS, KVFormat, PartView
from kvant.formats.base import Side
from tests.formats.scalar_oracle import HEAD_DIMS, offsets

SIDES: tuple[Side, ...] = get_args(Side)
ALL_SLOTS = np.arange(PAGE_TOKENS)

BY_TOKEN = [fmt for fmt in FORMATS.values() if not fmt.by_page]
BY_PAGE = [fmt for fmt in FORMATS.values() if fmt.by_page]

formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
by_token = pytest.mark.parametrize("fmt", BY_TOKEN, ids=str)
by_page = pytest.mark.parametrize("fmt", BY_PAGE, ids=str)
sides = pytest.mark.parametrize("side", SIDES)
head_dims = pytest.mark.parametrize("head_dim", (8, 64, 80, 112, 128))


def _pool(fmt: KVFormat, head_dim: int, pages: int = 1, heads: int = 1) -> NDArray[Any]:
    """Pages full of NaN and highest codes, so that a byte nobody writes shows."""
    return np.full((pages, heads, fmt.part_bytes(head_dim)), 0xFF, np.uint8)


def _vectors(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def _by_rows(fmt: KVFormat, x: NDArray[Any]) -> list[NDArray[np.uint8]]:
    """Each plane of the encoding as bytes ``[tokens, columns, itemsize]``; a plane of the page
    has a single row, filled up to 64 bytes with zeros."""
    planes = []
    for plane, values in zip(fmt.planes(x.shape[-1]), fmt.encode(x), strict=True):
        tokens = len(x) if plane.of == "token" else 1
        rows = np.ascontiguousarray(values).view(np.uint8).reshape(tokens, -1, values.itemsize)
        filling = 0 if plane.of == "token" else -rows.shape[1] % (64 // values.itemsize)
        planes.append(np.pad(rows, ((0, 0), (0, filling), (0, 0))))
    return planes


def _expected_part(fmt: KVFormat, side: Side, x: NDArray[Any]) -> NDArray[np.uint8]:
    """The part that holds ``x [64, D]``, byte by byte."""
    part = np.zeros(fmt.part_bytes(x.shape[-1]), np.uint8)
    for where, rows in zip(offsets(fmt, side, x.shape[-1]), _by_rows(fmt, x), strict=True):
        part[where] = rows
    return part


def _owner(fmt: KVFormat, side: Side, head_dim: int) -> NDArray[np.int64]:
    """The token that each byte of a part belongs to; -1 for those of the page."""
    owner = np.full(fmt.part_bytes(head_dim), -1)
    for where in offsets(fmt, side, head_dim):
        if len(where) == PAGE_TOKENS:
            owner[where] = ALL_SLOTS[:, None, None]
    return owner


@formats
@sides
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_byte_has_exactly_one_meaning(fmt: KVFormat, side: Side, head_dim: int) -> None:
    every = np.concatenate([where.ravel() for where in offsets(fmt, side, head_dim)])
    np.testing.assert_array_equal(np.sort(every), np.arange(fmt.part_bytes(head_dim)))


@formats
@sides
@head_dims
def test_every_byte_is_where_the_docstring_puts_it(
    fmt: KVFormat, side: Side, head_dim: int
) -> None:
    """Words of 16 tokens x 4 bytes in K, of tokens {2j, 2j+1, 2j+8, 2j+9} in V, planes of the
    page in order with zeros behind: native kernels are written from this map."""
    x = _vectors(PAGE_TOKENS, head_dim)
    raw = _pool(fmt, head_dim)
    PartView(fmt, side, head_dim, raw).fill(np.array([0]), x[None, :, None])
    np.testing.assert_array_equal(raw[0, 0], _expected_part(fmt, side, x))


@formats
@sides
def test_only_formats_by_page_have_bytes_of_the_page(fmt: KVFormat, side: Side) -> None:
    """What may be appended token by token: every byte is some token's, and all have as many."""
    tokens, counts = np.unique(_owner(fmt, side, 80), return_counts=True)
    assert fmt.by_page == (-1 in tokens)
    assert tokens[tokens >= 0].tolist() == ALL_SLOTS.tolist()
    assert len(set(counts[tokens >= 0])) == 1


@formats
@sides
def test_filling_pages_leaves_others_alone(fmt: KVFormat, side: Side) -> None:
    """Pages in any order, two heads."""
    x = _vectors(3, PAGE_TOKENS, 2, 80)
    raw = _pool(fmt, 80, 5, 2)
    pages = np.array([4, 0, 3])
    PartView(fmt, side, 80, raw).fill(pages, x)
    for page, vectors in zip(pages, x, strict=True):
        for head in range(2):
            expected = _expected_part(fmt, side, vectors[:, head])
            np.testing.assert_array_equal(raw[page, head], expected)
    assert (raw[[1, 2]] == 0xFF).all()


@by_token
@sides
@head_dims
def test_filling_is_writing_all_tokens(fmt: KVFormat, side: Side, head_dim: int) -> None:
    x = _vectors(2, PAGE_TOKENS, 3, head_dim)
    filled, written = _pool(fmt, head_dim, 3, 3), _pool(fmt, head_dim, 3, 3)
    pages = np.array([2, 1])
    PartView(fmt, side, head_dim, filled).fill(pages, x)
    slots = np.tile(ALL_SLOTS, 2)
    view = PartView(fmt, side, head_dim, written)
    view.write(np.repeat(pages, PAGE_TOKENS), slots, x.reshape(-1, 3, head_dim))
    np.testing.assert_array_equal(filled, written)


@formats
@sides
@head_dims
def test_read_inverts_the_map_for_any_page_list(fmt: KVFormat, side: Side, head_dim: int) -> None:
    """Pages out of order, one of them twice, and two heads."""
    x = _vectors(4, 2, PAGE_TOKENS, head_dim)
    raw = np.array([[_expected_part(fmt, side, head) for head in page] for page in x])
    order = np.array([3, 0, 2, 3])
    got = PartView(fmt, side, head_dim, raw).read(order)
    expected = fmt.dequantize(fmt.encode(x[order]), head_dim)  # [pages, H, 64, D]
    np.testing.assert_array_equal(
        got, expected.swapaxes(0, 1).reshape(2, len(order) * PAGE_TOKENS, head_dim)
    )


@by_token
@sides
@pytest.mark.parametrize("head_dim", (8, 80, 128))
def test_writing_a_token_touches_its_own_bytes_only(
    fmt: KVFormat, side: Side, head_dim: int
) -> None:
    """Appending needs no lock and no read of the neighbours; NaNs of others do no harm."""
    x = _vectors(PAGE_TOKENS, head_dim)
    expected = _expected_part(fmt, side, x)
    owner = _owner(fmt, side, head_dim)
    for token in range(PAGE_TOKENS):
        raw = _pool(fmt, head_dim)
        view = PartView(fmt, side, head_dim, raw)
        view.write(np.array([0]), np.array([token]), x[None, token : token + 1])
        np.testing.assert_array_equal(raw[0, 0], np.where(owner == token, expected, 0xFF))


@by_token
@sides
def test_tokens_may_come_in_any_order_and_company(fmt: KVFormat, side: Side) -> None:
    """One call for tokens of several pages, in shuffled order, equals a call per token."""
    x = _vectors(3 * PAGE_TOKENS, 2, 64)
    slots = np.arange(len(x))
    together, alone = _pool(fmt, 64, 5, 2), _pool(fmt, 64, 5, 2)
    order = np.random.default_rng(0).permutation(len(x))
    pages = np.array([4, 0, 3])[slots // PAGE_TOKENS]
    PartView(fmt, side, 64, together).write(pages[order], slots[order] % PAGE_TOKENS, x[order])
    for n in slots:
        PartView(fmt, side, 64, alone).write(
            pages[n : n + 1], slots[n : n + 1] % PAGE_TOKENS, x[n : n + 1]
        )
    np.testing.assert_array_equal(together, alone)
    assert (together[[1, 2]] == 0xFF).all()


@by_token
@sides
@pytest.mark.parametrize("poison", (np.nan, np.inf))
def test_a_broken_vector_leaves_all_other_bytes_alone(
    fmt: KVFormat, side: Side, poison: float
) -> None:
    """On the bytes of a page: other tokens and other heads keep theirs bit by bit."""
    x = _vectors(PAGE_TOKENS, 2, 64)
    clean, broken = _pool(fmt, 64, 1, 2), _pool(fmt, 64, 1, 2)
    PartView(fmt, side, 64, clean).write(np.zeros_like(ALL_SLOTS), ALL_SLOTS, x)
    x[9, 1, 3] = poison
    view = PartView(fmt, side, 64, broken)
    view.write(np.zeros_like(ALL_SLOTS), ALL_SLOTS, x)
    changed = clean[0, 1] != broken[0, 1]
    assert set(_owner(fmt, side, 64)[changed]) == {9}
    np.testing.assert_array_equal(clean[0, 0], broken[0, 0])
    assert not np.isfinite(view.read(np.array([0]))[1, 9]).all()


@by_page
@sides
@pytest.mark.parametrize("poison", (np.nan, np.inf))
def test_a_broken_element_of_a_page_kills_its_channel_alone(
    fmt: KVFormat, side: Side, poison: float
) -> None:
    """One element of one head of one page: the other page and head keep their bytes, the other
    channels what they decode to, and the channel is NaN for all tokens."""
    x = _vectors(2, PAGE_TOKENS, 2, 80)
    clean, broken = _pool(fmt, 80, 2, 2), _pool(fmt, 80, 2, 2)
    PartView(fmt, side, 80, clean).fill(np.array([0, 1]), x)
    x[1, 9, 0, 3] = poison
    view = PartView(fmt, side, 80, broken)
    expected = PartView(fmt, side, 80, clean).read(np.array([0, 1]))
    view.fill(np.array([0, 1]), x)
    changed = clean != broken
    assert changed[1, 0].any() and changed.sum() == changed[1, 0].sum()
    expected[0, PAGE_TOKENS:, 3] = np.nan
    np.testing.assert_array_equal(view.read(np.array([0, 1])), expected)


@formats
@sides
def test_no_pages_at_all(fmt: KVFormat, side: Side) -> None:
    """A sequence that has no full page yet: held down, a list that cannot be reshaped."""
    view = PartView(fmt, side, 64, _pool(fmt, 64, 2, 3))
    none = np.empty(0, np.int64)
    assert view.read(none).shape == (3, 0, 64)
    view.fill(none, np.empty((0, PAGE_TOKENS, 3, 64), np.float32))
    if not fmt.by_page:
        view.write(none, none, np.empty((0, 3, 64), np.float32))


def test_map_and_oracle_agree_with_the_words_of_the_docstring() -> None:
    """A worked example, so that both cannot drift together: head_dim 64, int8 planes of 128,
    128 and 4096 bytes; what stands at some offsets, as (token, column)."""
    codes = 128 + 128

    def at(name: str, side: Side, offset: int, plane: int = 2) -> tuple[int, int]:
        token, column, _ = np.argwhere(offsets(FORMATS[name], side, 64)[plane] == offset)[0]
        return int(token), int(column)

    scales, zeros, _ = offsets(FORMATS["int8"], "k", 64)
    assert (scales[5, 0].tolist(), zeros[5, 0].tolist()) == ([10, 11], [138, 139])
    assert [at("int8", "k", codes + n) for n in range(5)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
    ]
    assert at("int8", "k", codes + 64) == (0, 4)  # the next line: four more dimensions
    assert at("int8", "k", codes + 64 * 16) == (16, 0)  # all 64 dimensions, then 16 more tokens
    assert [at("int8", "v", codes + n) for n in range(5)] == [
        (0, 0),
        (1, 0),
        (8, 0),
        (9, 0),
        (0, 1),
    ]
    assert [at("int8", "v", codes + 64 + n)[0] for n in range(4)] == [2, 3, 10, 11]
    assert at("int8", "v", codes + 64 * 16) == (0, 16)  # all 64 tokens, then 16 more dimensions
    assert at("int4", "k", codes + 64 * 8) == (16, 0)  # 32 bytes hold 64 dimensions
    assert at("int4", "v", codes + 64 * 32 - 1) == (63, 31)
    # int3m: a scale per token, 16 bytes of low bits, 8 bytes of high bits
    assert at("int3m", "k", 128 + 64 * 4, plane=1) == (16, 0)
    assert at("int3m", "k", 128 + 64 * 16, plane=2) == (0, 0)
    assert at("int3m", "v", 128 + 64 * 16 + 4 * 8, plane=2) == (2, 0)  # 8 columns x 4 tokens
    # int5c: a scale and a zero per dimension, 32 bytes of low bits, 8 of high bits
    scales, zeros = offsets(FORMATS["int5c"], "k", 64)[:2]
    assert (scales[0, 5].tolist(), zeros[0, 5].tolist()) == ([10, 11], [138, 139])
    assert at("int5c", "k", 128 + 128 + 64, plane=2) == (0, 4)
    assert at("int5c", "v", 128 + 128 + 64 * 32 + 5, plane=3) == (1, 1)
    # 80 float16 numbers are 160 bytes, so the zeros begin at 192
    assert offsets(FORMATS["int4c"], "k", 80)[1][0, 0].tolist() == [192, 193]


@pytest.mark.parametrize(
    ("name", "head_dim", "bits"),
    [
        ("f32", 64, 32),
        ("f16", 80, 16),
        ("bf16", 128, 16),
        ("fp8", 64, 8.25),
        ("fp8", 128, 8.125),
        ("int8", 64, 8.5),
        ("int8", 128, 8.25),
        ("int8h", 128, 8.25),
        ("int4", 64, 4.5),
        ("int4", 128, 4.25),
        ("int4h", 64, 4.5),
        ("int4h", 256, 4.125),
        ("int8c", 64, 8.5),
        ("int6c", 128, 6.5),
        ("int5c", 128, 5.5),
        ("int4c", 64, 4.5),
        ("int4c", 256, 4.5),
        ("int4c", 80, 4.6),  # 2 x 192 bytes of metadata
        ("int3c", 128, 3.5),
        ("int4m", 128, 4.125),
        ("int3m", 128, 3.125),
        ("int3m", 80, 3.4),  # 20 and 12 bytes of codes for a token
        ("int2m", 64, 2.25),
        ("int2m", 8, 6),
    ],
)
def test_bits_per_element_count_the_metadata(name: str, head_dim: int, bits: float) -> None:
    assert FORMATS[name].bits_per_element(head_dim) == bits


@formats
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_plane_starts_on_a_cache_line(fmt: KVFormat, head_dim: int) -> None:
    """Held down: vector loads that straddle lines, and byte maps that differ by padding."""
    sizes = [plane.nbytes for plane in fmt.planes(head_dim)]
    assert all(size % 64 == 0 for size in sizes)
    assert fmt.part_bytes(head_dim) == sum(sizes)
