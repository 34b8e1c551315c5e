"""Pages opened by layer: what is written is read, in its own bytes and nowhere else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvant.formats import FORMATS, PAGE_TOKENS, PRESETS, KVFormat, KVShape, KVSpec, PartView
from kvant.formats.pages import open_pages

SHAPE = KVShape(num_layers=3, num_kv_heads=2, head_dim=80)
SPECS = (*(name for name, fmt in FORMATS.items() if not fmt.by_page), *PRESETS)
MIXED = "k4v4;0=int8h;-1=k=f16,v=int2m"

specs = pytest.mark.parametrize("kv", (*SPECS, MIXED))


def _pages(spec: KVSpec, count: int = 5) -> NDArray[np.uint8]:
    return np.full((count, spec.page_bytes(SHAPE)), 0xFF, np.uint8)


def _vectors(pages: int) -> Any:
    rng = np.random.default_rng(1)
    shape = 2, pages, PAGE_TOKENS, SHAPE.num_kv_heads, SHAPE.head_dim
    return rng.standard_normal(shape).astype(np.float32)


def _kept(fmt: KVFormat, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Whole pages ``[n, 64, H, D]``, encoded and decoded."""
    by_head = x.swapaxes(1, 2)
    return fmt.decode(fmt.encode(by_head), x.shape[-1]).swapaxes(1, 2)


@specs
def test_pages_decode_to_what_the_formats_keep(kv: str) -> None:
    """Pages in any order; K and V of each layer, rotated back."""
    spec = KVSpec.parse(kv)
    pages = _pages(spec)
    for layer, (opened, at) in enumerate(
        zip(open_pages(spec, SHAPE, pages), spec.layout(SHAPE), strict=True)
    ):
        k, v = _vectors(2) + layer
        opened.fill(np.array([4, 1]), k, v)
        found = opened.decode(np.array([1, 4, 1]))
        for got, fmt, x in zip(found, (at.k, at.v), (k, v), strict=True):
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, _kept(fmt, x)[[1, 0, 1]])


@specs
def test_a_layer_has_its_bytes_and_no_others(kv: str) -> None:
    """In each, head pages of the K part, then the V part."""
    spec = KVSpec.parse(kv)
    for layer, at in enumerate(spec.layout(SHAPE)):
        pages = _pages(spec, 3)
        k, v = _vectors(1)
        open_pages(spec, SHAPE, pages)[layer].fill(np.array([1]), k, v)
        assert (pages[[0, 2]] == 0xFF).all()
        assert (pages[1, : at.offset] == 0xFF).all()
        assert (pages[1, at.offset + at.nbytes :] == 0xFF).all()
        heads = pages[1, at.offset : at.offset + at.nbytes].reshape(SHAPE.num_kv_heads, -1)
        expected = []
        for fmt, side, x in ((at.k, "k", k), (at.v, "v", v)):
            raw = np.zeros((1, SHAPE.num_kv_heads, fmt.part_bytes(SHAPE.head_dim)), np.uint8)
            PartView(fmt, "k" if side == "k" else "v", SHAPE.head_dim, raw).fill(np.array([0]), x)
            expected.append(raw[0])
        np.testing.assert_array_equal(heads, np.concatenate(expected, axis=-1))


@pytest.mark.parametrize("kv", [name for name in SPECS if name not in PRESETS])
def test_writing_token_by_token_is_filling(kv: str) -> None:
    spec = KVSpec.parse(kv)
    filled, written = _pages(spec), _pages(spec)
    k, v = _vectors(2)
    open_pages(spec, SHAPE, filled)[2].fill(np.array([3, 0]), k, v)
    slots = np.tile(np.arange(PAGE_TOKENS), 2)
    flat = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    open_pages(spec, SHAPE, written)[2].write(np.repeat([3, 0], PAGE_TOKENS), slots, *flat)
    np.testing.assert_array_equal(filled, written)


def test_layers_may_share_the_room_of_one() -> None:
    """Scratch pages: each layer begins at the first byte, whatever its size."""
    spec = KVSpec.parse(MIXED)
    layout = spec.layout(SHAPE)
    assert len({at.nbytes for at in layout}) == 3
    shared = np.full((2, max(at.nbytes for at in layout)), 0xFF, np.uint8)
    k, v = _vectors(1)
    for opened, at in zip(open_pages(spec, SHAPE, shared, one_layer=True), layout, strict=True):
        shared[:] = 0xFF
        opened.fill(np.array([1]), k, v)
        own = _pages(spec, 1)
        alone = next(o for o in open_pages(spec, SHAPE, own) if o.k.fmt == at.k and o.v.fmt == at.v)
        alone.fill(np.array([0]), k, v)
        np.testing.assert_array_equal(
            shared[1, : at.nbytes], own[0, at.offset : at.offset + at.nbytes]
        )
        assert (shared[0] == 0xFF).all() and (shared[1, at.nbytes :] == 0xFF).all()


@specs
def test_no_pages_at_all(kv: str) -> None:
    spec = KVSpec.parse(kv)
    opened = open_pages(spec, SHAPE, _pages(spec))[0]
    k, v = opened.decode(np.empty(0, np.int64))
    assert k.shape == v.shape == (0, PAGE_TOKENS, SHAPE.num_kv_heads, SHAPE.head_dim)
