"""The allocator: one state per page, references counted, oldest content forgotten first."""

from __future__ import annotations

import pytest

from kvant.cache.pages import BlockHash, PageAllocator, PageId, page_hash

A, B, C = (BlockHash(name.encode()) for name in "abc")


def _cached(pages: PageAllocator, digest: BlockHash) -> PageId:
    """A page that nobody holds but that can be found by ``digest``."""
    page = pages.allocate()
    pages.register(page, digest)
    pages.release(page)
    return page


def test_low_numbers_go_first() -> None:
    """An idle pool costs no resident memory: pages never used stay untouched."""
    pages = PageAllocator(4)
    assert [pages.allocate() for _ in range(3)] == [0, 1, 2]
    pages.release(PageId(1))
    assert pages.allocate() == 1
    pages.check([[PageId(0), PageId(1), PageId(2)]])


def test_free_pages_go_before_cached_ones() -> None:
    pages = PageAllocator(2)
    kept = _cached(pages, A)
    assert pages.allocate() != kept
    assert pages.find(A) == kept
    assert pages.allocate() == kept
    assert pages.find(A) is None


def test_the_least_recently_used_content_is_evicted_and_forgotten() -> None:
    """Used means held: a hit makes a page the newest when it is given back."""
    pages = PageAllocator(3)
    a, b, c = (_cached(pages, digest) for digest in (A, B, C))
    pages.share(a)
    pages.release(a)
    assert [pages.allocate() for _ in range(3)] == [b, c, a]
    assert pages.find(A) is pages.find(B) is pages.find(C) is None
    pages.check([[a, b, c]])


def test_finding_takes_no_reference_and_changes_no_order() -> None:
    pages = PageAllocator(2)
    a, b = _cached(pages, A), _cached(pages, B)
    assert pages.find(A) == a
    assert pages.num_held == 0
    assert pages.allocate() == a
    assert pages.find(B) == b


def test_a_shared_page_is_given_back_with_its_last_reference() -> None:
    pages = PageAllocator(1)
    page = pages.allocate()
    assert not pages.is_shared(page)
    pages.share(page)
    assert pages.is_shared(page)
    pages.release(page)
    assert (pages.num_held, pages.num_available) == (1, 0)
    assert not pages.is_shared(page)
    pages.release(page)
    assert (pages.num_held, pages.num_available) == (0, 1)


def test_a_held_page_can_be_found_and_outlives_its_writer() -> None:
    """Prompts that run at the same time share pages; the second holder keeps the content."""
    pages = PageAllocator(1)
    page = pages.allocate()
    pages.register(page, A)
    assert pages.find(A) == page
    pages.share(page)
    pages.release(page)
    assert pages.find(A) == page
    assert pages.num_cached == 0
    pages.release(page)
    assert pages.num_cached == 1


def test_the_first_page_with_a_content_keeps_it() -> None:
    """Held down: two pages under one hash, of which eviction of one forgets the other."""
    pages = PageAllocator(2)
    first, second = pages.allocate(), pages.allocate()
    pages.register(first, A)
    pages.register(second, A)
    pages.register(first, B)  # nor is a page found by two hashes
    assert pages.find(A) == first
    assert pages.find(B) is None
    pages.release(second)
    assert (pages.num_cached, pages.num_available) == (0, 1)
    pages.check([[first]])


def test_all_pages_held_is_an_error_that_changes_nothing() -> None:
    pages = PageAllocator(1)
    page = pages.allocate()
    with pytest.raises(MemoryError, match="1 pages"):
        pages.allocate()
    pages.check([[page]])
    with pytest.raises(MemoryError):
        PageAllocator(0).allocate()


def test_cleared_pages_are_free_and_not_found() -> None:
    pages = PageAllocator(3)
    _cached(pages, A)
    _cached(pages, B)
    held = pages.allocate()
    pages.clear_cached()
    assert pages.find(A) is pages.find(B) is None
    assert (pages.num_cached, pages.num_available, pages.num_held) == (0, 2, 1)
    pages.check([[held]])


@pytest.mark.parametrize(
    "holders", ([], [[PageId(0)]], [[PageId(0), PageId(1)], [PageId(1)]], [[PageId(0), PageId(2)]])
)
def test_check_sees_references_that_do_not_add_up(holders: list[list[PageId]]) -> None:
    pages = PageAllocator(3)
    pages.allocate()
    pages.allocate()
    pages.check([[PageId(0)], [PageId(1)]])
    with pytest.raises(AssertionError, match="references"):
        pages.check(holders)


def test_hash_of_a_page_is_that_of_all_tokens_before_it() -> None:
    """Held down: equal pages after different beginnings taken for each other; token 1, 23 for
    12, 3; and ids above 2^32 cut off."""
    tokens = list(range(64))
    first = page_hash(None, tokens)
    hashes = {
        first,
        page_hash(first, tokens),
        page_hash(page_hash(first, tokens), tokens),
        page_hash(None, [1, 23, *tokens[2:]]),
        page_hash(None, [12, 3, *tokens[2:]]),
        page_hash(None, [2**32, *tokens[1:]]),
        page_hash(None, tokens[::-1]),
    }
    assert len(hashes) == 7
    assert page_hash(None, tuple(tokens)) == first
