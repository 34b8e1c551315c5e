"""The cache as the scheduler sees it: what a sequence holds, and how that grows and ends.

Two allocators: *base* pages in the spec's own formats and, if the spec has a recent part,
*recent* pages in its finer format. Where a token is kept depends on its position only:

    no recent part     positions [0, n) in base pages 0 .. ceil(n / 64) - 1, the last one open
    with one           full groups [0, n // 64) in base pages, [64 * (n // 64), n) in one recent
                       page; a group that becomes full is encoded into a new base page and its
                       recent page is given back
    with a sink        group 0 in a recent page of its own from the first token on, open or
                       full, never encoded again; the other groups as above

so a sequence holds at most one recent page, with a sink two, and a page found by hash is always
full: a base page, or a sink. Writing a page that somebody else holds too copies it first
(copy-on-write).

No numpy, no torch: pages are numbers and the copies to make are returned as data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvant.cache.pages import BlockHash, PageAllocator, PageId, page_hash
from kvant.formats.base import PAGE_TOKENS

__all__ = ["Holding", "PageCopy", "PagedCache"]


class PageCopy(NamedTuple):
    """Copy page ``source`` to ``target`` before the step, in the recent or the base pool."""

    recent: bool
    source: PageId
    target: PageId


@dataclass(slots=True)
class Holding:
    """The pages of one sequence: ``pages[i]`` is that of group ``i``, a base page (with a sink
    ``pages[0]`` is a recent page), ``recent`` that of an open group which is not in ``pages``.
    ``hashes[i]`` is the content hash of full page ``i``; the first ``registered`` full pages have
    been offered to later prompts."""

    pages: list[PageId] = field(default_factory=list)
    recent: PageId | None = None
    hashes: list[BlockHash] = field(default_factory=list)
    registered: int = 0


class PagedCache:
    """Allocation, sharing and eviction for all sequences of an engine.

    Args:
        num_pages: base pages in the pool.
        num_recent: recent pages in theirs; 0 for a spec without a recent part.
        sink: whether group 0 stays in a recent page; takes at least two of them.
        prefix_caching: whether full pages can be found by later prompts.
    """

    def __init__(
        self, num_pages: int, num_recent: int, *, sink: bool, prefix_caching: bool
    ) -> None:
        assert not sink or num_recent > 1, "a sequence with a sink needs two recent pages"
        self.base = PageAllocator(num_pages)
        self.recent = PageAllocator(num_recent)
        self.has_recent = num_recent > 0
        self.sink = sink
        self.prefix_caching = prefix_caching

    def page_count(self, num_tokens: int) -> int:
        """Length of ``Holding.pages`` for a sequence of this many tokens."""
        full, open_tokens = divmod(num_tokens, PAGE_TOKENS)
        return full + (open_tokens > 0 and self._open_in_pages(full))

    def missing_base_pages(self, holding: Holding, num_tokens: int) -> int:
        """Base pages that a sequence must take to grow to this many tokens."""
        new_sink = self.sink and not holding.pages
        return max(self.page_count(num_tokens) - len(holding.pages) - new_sink, 0)

    def _pool(self, group: int) -> PageAllocator:
        """Where the page of a group in ``Holding.pages`` comes from."""
        return self.recent if self.sink and group == 0 else self.base

    def _open_in_pages(self, group: int) -> bool:
        """Whether a group is in ``Holding.pages`` while it is open."""
        return not self.has_recent or (self.sink and group == 0)

    def chunk_end(self, start: int, end: int, target: int) -> int:
        """Where a chunk ``[start, end)`` of a sequence of ``target`` tokens should end.

        With a recent part a chunk touches at most one open group: one that starts inside a
        group ends with it, and one that stops short of the target stops at a group border.
        """
        if not self.has_recent:
            return end
        if start % PAGE_TOKENS:
            return min(end, start - start % PAGE_TOKENS + PAGE_TOKENS)
        border = end - end % PAGE_TOKENS
        return border if end < target and border > start else end

    def adopt_prefix(self, holding: Holding, tokens: Sequence[int], most: int) -> int:
        """Take the cached pages that match the start of ``tokens``, at most ``most`` of them;
        returns the tokens they hold."""
        if not self.prefix_caching:
            return 0
        count = most // PAGE_TOKENS
        self._hash_pages(holding, tokens, count)
        for group, digest in enumerate(holding.hashes[:count]):
            pool = self._pool(group)
            page = pool.find(digest)
            if page is None:
                break
            pool.share(page)
            holding.pages.append(page)
        holding.registered = len(holding.pages)
        return len(holding.pages) * PAGE_TOKENS

    def adopt_fork(self, holding: Holding, parent: Holding, computed: int, end: int) -> int:
        """Share what ``parent``, with ``computed`` tokens, holds of positions ``[0, end)``;
        returns how many of them. Its open page is shared too and copied when written."""
        full, open_tokens = divmod(end, PAGE_TOKENS)
        pages = parent.pages[: self.page_count(end)]
        for group, page in enumerate(pages):
            self._pool(group).share(page)
        holding.pages.extend(pages)
        if open_tokens and not self._open_in_pages(full):
            if parent.recent is None or computed // PAGE_TOKENS != full:
                return full * PAGE_TOKENS
            self.recent.share(parent.recent)
            holding.recent = parent.recent
        return end

    def reserve(self, holding: Holding, start: int, end: int) -> list[PageCopy] | None:
        """Make positions ``[start, end)`` writable, following :meth:`chunk_end`.

        Returns the copies to make first, or None, with nothing changed, if pages run out.
        """
        group, is_open = start // PAGE_TOKENS, start % PAGE_TOKENS > 0
        grow = [self._pool(i) for i in range(len(holding.pages), self.page_count(end))]
        in_pages = self._open_in_pages(group)
        open_pool = self._pool(group) if in_pages else self.recent
        open_page: PageId | None = None
        if is_open:
            open_page = holding.pages[group] if in_pages else holding.recent
        copy_open = open_page is not None and open_pool.is_shared(open_page)
        new_recent = (
            not is_open and end % PAGE_TOKENS > 0 and not self._open_in_pages(end // PAGE_TOKENS)
        )
        wanted = grow + copy_open * [open_pool] + new_recent * [self.recent]
        if any(wanted.count(pool) > pool.num_available for pool in (self.base, self.recent)):
            return None
        copies = []
        if open_page is not None and copy_open:
            target = open_pool.allocate()
            copies.append(PageCopy(open_pool is self.recent, open_page, target))
            open_pool.release(open_page)
            if in_pages:
                holding.pages[group] = target
            else:
                holding.recent = target
        if new_recent:
            holding.recent = self.recent.allocate()
        holding.pages.extend(pool.allocate() for pool in grow)
        return copies

    def commit(self, holding: Holding, tokens: Sequence[int], computed: int) -> None:
        """Positions ``[0, computed)`` are in their pages now: let full ones be found, give the
        recent page of a finished group back."""
        if holding.recent is not None and computed % PAGE_TOKENS == 0:
            self.recent.release(holding.recent)
            holding.recent = None
        if self.prefix_caching:
            full = computed // PAGE_TOKENS
            self._hash_pages(holding, tokens, full)
            for group in range(holding.registered, full):
                self._pool(group).register(holding.pages[group], holding.hashes[group])
            holding.registered = full

    def release(self, holding: Holding) -> None:
        """Give everything back. The end of a prefix goes first, so it is evicted first."""
        for group, page in reversed(list(enumerate(holding.pages))):
            self._pool(group).release(page)
        if holding.recent is not None:
            self.recent.release(holding.recent)
        holding.pages.clear()
        holding.recent = None
        holding.registered = 0

    @staticmethod
    def _hash_pages(holding: Holding, tokens: Sequence[int], count: int) -> None:
        hashes = holding.hashes
        for index in range(len(hashes), count):
            page = tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS]
            hashes.append(page_hash(hashes[-1] if hashes else None, page))

    def check(self, holdings: Iterable[Holding]) -> None:
        """Raise AssertionError if an invariant of the pools or of a holding is broken."""
        holdings = list(holdings)
        self.base.check(h.pages[self.sink :] for h in holdings)
        self.recent.check(
            h.pages[: self.sink] + ([] if h.recent is None else [h.recent]) for h in holdings
        )
