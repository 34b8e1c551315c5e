"""The bytes of pages: zero at first, aligned, copied whole, and nothing at all when unused."""

from __future__ import annotations

import numpy as np
import pytest

from kvant.cache.pool import BytePool


def test_pages_are_zero_until_written_and_do_not_overlap() -> None:
    pool = BytePool(5, 4352)
    assert pool.nbytes == 5 * 4352
    assert pool.pages.shape == (5, 4352)
    assert pool.pages.dtype == np.uint8
    assert not pool.pages.any()
    pool.pages[2] = 0xFF
    assert pool.pages.any(axis=1).tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("page_bytes", (64, 4352, 8704))
def test_every_page_starts_on_a_cache_line(page_bytes: int) -> None:
    """Parts are multiples of 64 bytes, so aligned loads hold down to the last plane."""
    pool = BytePool(3, page_bytes)
    assert all(page.ctypes.data % 64 == 0 for page in pool.pages)
    assert pool.pages.flags.c_contiguous


def test_copy_takes_the_whole_page_and_nothing_else() -> None:
    pool = BytePool(3, 192)
    pool.pages[:] = np.arange(3 * 192).reshape(3, 192) % 251
    before = pool.pages.copy()
    pool.copy(2, 0)
    np.testing.assert_array_equal(pool.pages, before[[2, 1, 2]])


@pytest.mark.parametrize("num_pages", (0, 1))
def test_an_empty_pool_is_a_pool(num_pages: int) -> None:
    """A spec without a recent part has no recent pages."""
    pool = BytePool(num_pages, 64)
    assert pool.pages.shape == (num_pages, 64)
    assert pool.nbytes == 64 * num_pages
