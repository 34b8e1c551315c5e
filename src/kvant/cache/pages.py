"""Which page is free, shared or cached: reference counts, hashes of contents, LRU order.

A page is always in exactly one state:

    free      never used, or its content can never be found again
    held      one or more sequences hold a reference
    cached    no reference, but a hash: a later prompt may still find it; evicted oldest first

Pages are numbers here; their bytes live in :mod:`kvant.cache.pool`. No numpy, no torch.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NewType

__all__ = ["BlockHash", "PageAllocator", "PageId", "page_hash"]

PageId = NewType("PageId", int)
BlockHash = NewType("BlockHash", bytes)


def page_hash(parent: BlockHash | None, tokens: Sequence[int]) -> BlockHash:
    """Hash of a full page: its 64 token ids and, through ``parent``, all that came before."""
    digest = hashlib.blake2b(parent or b"", digest_size=16)
    digest.update(array("q", tokens).tobytes())
    return BlockHash(digest.digest())


class PageAllocator:
    """Hands out pages ``0 .. num_pages - 1``.

    Free pages go first, the last released before those never used and these by number, so that
    little memory is touched; then cached pages, least recently used first.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references: dict[PageId, int] = {}
        self._cached: OrderedDict[PageId, None] = OrderedDict()
        self._page_of: dict[BlockHash, PageId] = {}
        self._hash_of: dict[PageId, BlockHash] = {}

    @property
    def num_available(self) -> int:
        """Pages that :meth:`allocate` could hand out: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Unreferenced pages whose content can still be found by hash."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages with at least one reference."""
        return len(self._references)

    def cached_pages(self) -> tuple[PageId, ...]:
        """The pages that :attr:`num_cached` counts, by number."""
        return tuple(sorted(self._cached))

    def allocate(self) -> PageId:
        """Take a page with one reference; evicts the least recently used cached page if no
        free one is left. Raises MemoryError when all are held."""
        if self._free:
            page = PageId(self._free.pop())
        elif self._cached:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        else:
            raise MemoryError(f"all {self.num_pages} pages are held")
        self._references[page] = 1
        return page

    def share(self, page: PageId) -> None:
        """Add a reference to a held or cached page."""
        self._cached.pop(page, None)
        self._references[page] = self._references.get(page, 0) + 1

    def is_shared(self, page: PageId) -> bool:
        """Whether somebody else holds a held page, or may find it by its hash: such a page must
        not be written."""
        return self._references[page] > 1 or page in self._hash_of

    def release(self, page: PageId) -> None:
        """Drop a reference; the last one makes the page cached if it has a hash, else free."""
        self._references[page] -= 1
        if self._references[page]:
            return
        del self._references[page]
        if page in self._hash_of:
            self._cached[page] = None
        else:
            self._free.append(page)

    def register(self, page: PageId, digest: BlockHash) -> None:
        """Let later prompts find a held page that is full and will not be written again. Does
        nothing if another page already has the content: both hold the same encoding."""
        if digest not in self._page_of and page not in self._hash_of:
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def find(self, digest: BlockHash) -> PageId | None:
        """The page with this content, if it is still in the pool. Takes no reference."""
        return self._page_of.get(digest)

    def clear_cached(self) -> None:
        """Make all cached pages free. Held pages that are registered can still be found."""
        for page in self._cached:
            self._forget(page)
            self._free.append(page)
        self._cached.clear()

    def _forget(self, page: PageId) -> None:
        del self._page_of[self._hash_of.pop(page)]

    def check(self, holders: Iterable[Sequence[PageId]] = ()) -> None:
        """Raise AssertionError if an invariant is broken; ``holders`` are the page lists of
        all sequences alive, whose references must add up exactly."""
        free: set[int] = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        states: list[set[int]] = [free, set(self._references), set(self._cached)]
        assert sum(len(s) for s in states) == self.num_pages, "a page is lost or in two states"
        assert set().union(*states) == set(range(self.num_pages)), "unknown page"
        assert all(count > 0 for count in self._references.values()), "reference count below 1"
        assert set(self._cached) <= set(self._hash_of), "a cached page has no hash"
        assert not free & set(self._hash_of), "a free page has a hash"
        assert {d: p for p, d in self._hash_of.items()} == self._page_of, "hash maps differ"
        counted: dict[PageId, int] = {}
        for pages in holders:
            for page in pages:
                counted[page] = counted.get(page, 0) + 1
        assert counted == self._references, "references differ from what sequences hold"
