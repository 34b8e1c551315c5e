"""The cache as the scheduler sees it: what a sequence holds, and how that grows and ends.

Two allocators: *base* pages in the spec's own formats and, if the spec has a recent part,
*recent* pages in its finer format. Where a token is kept depends on its position only:

    no recent part     positions [0, n) in base pages 0 .. ceil(n / 64) - 1, the last one open
    with one           full groups [0, n // 64) in base pages, [64 * (n // 64), n) in one recent
                       page; a group that becomes full is encoded into a new base page and its
                       recent page is given back

so a sequence holds at most one recent page, and a page found by hash is always a full base
page. Writing a page that somebody else holds too copies it first (copy-on-write).

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
    """The pages of one sequence. ``hashes[i]`` is the content hash of full page ``i``; the
    first ``registered`` full pages have been offered to later prompts."""

    pages: list[PageId] = field(default_factory=list)
    recent: PageId | None = None
    hashes: list[BlockHash] = field(default_factory=list)
    registered: int = 0


class PagedCache:
    """Allocation, sharing and eviction for all sequences of an engine.

    Args:
        num_pages: base pages in the pool.
        num_recent: recent pages in theirs; 0 for a spec without a recent part.
        prefix_caching: whether full pages can be found by later prompts.
    """

    def __init__(self, num_pages: int, num_recent: int, *, prefix_caching: bool) -> None:
        self.base = PageAllocator(num_pages)
        self.recent = PageAllocator(num_recent)
        self.has_recent = num_recent > 0
        self.prefix_caching = prefix_caching

    def base_pages(self, num_tokens: int) -> int:
        """Base pages that a sequence of this many tokens holds."""
        return num_tokens // PAGE_TOKENS if self.has_recent else -(-num_tokens // PAGE_TOKENS)

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

    def adopt_prefix(self, holding: Holding, tokens: Sequence[int]) -> int:
        """Take the cached pages that match the start of ``tokens``; returns the tokens they
        hold. At least the last token is left to compute: its logits are wanted."""
        if not self.prefix_caching:
            return 0
        most = (len(tokens) - 1) // PAGE_TOKENS
        self._hash_pages(holding, tokens, most)
        for digest in holding.hashes[:most]:
            page = self.base.find(digest)
            if page is None:
                break
            self.base.share(page)
            holding.pages.append(page)
        holding.registered = len(holding.pages)
        return len(holding.pages) * PAGE_TOKENS

    def adopt_fork(self, holding: Holding, parent: Holding, computed: int, end: int) -> int:
        """Share what ``parent``, with ``computed`` tokens, holds of positions ``[0, end)``;
        returns how many of them. Its open page is shared too and copied when written."""
        full, open_tokens = divmod(end, PAGE_TOKENS)
        pages = parent.pages[: full if self.has_recent else self.base_pages(end)]
        for page in pages:
            self.base.share(page)
        holding.pages.extend(pages)
        if self.has_recent and open_tokens:
            if parent.recent is None or computed // PAGE_TOKENS != full:
                return full * PAGE_TOKENS
            self.recent.share(parent.recent)
            holding.recent = parent.recent
        return end

    def reserve(self, holding: Holding, start: int, end: int) -> list[PageCopy] | None:
        """Make positions ``[start, end)`` writable, following :meth:`chunk_end`.

        Returns the copies to make first, or None, with nothing changed, if pages run out.
        """
        grow = self.base_pages(end) - len(holding.pages)
        open_before = start % PAGE_TOKENS > 0
        open_page = start // PAGE_TOKENS
        copy_base = (
            not self.has_recent and open_before and self.base.is_shared(holding.pages[open_page])
        )
        new_recent = self.has_recent and not open_before and end % PAGE_TOKENS > 0
        copy_recent = (
            self.has_recent
            and open_before
            and holding.recent is not None
            and self.recent.is_shared(holding.recent)
        )
        if grow + copy_base > self.base.num_available:
            return None
        if new_recent + copy_recent > self.recent.num_available:
            return None
        copies = []
        if copy_base:
            source = holding.pages[open_page]
            target = self.base.allocate()
            copies.append(PageCopy(False, source, target))
            holding.pages[open_page] = target
            self.base.release(source)
        if copy_recent and holding.recent is not None:
            source = holding.recent
            holding.recent = self.recent.allocate()
            copies.append(PageCopy(True, source, holding.recent))
            self.recent.release(source)
        if new_recent:
            holding.recent = self.recent.allocate()
        holding.pages.extend(self.base.allocate() for _ in range(grow))
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
            for index in range(holding.registered, full):
                self.base.register(holding.pages[index], holding.hashes[index])
            holding.registered = full

    def release(self, holding: Holding) -> None:
        """Give everything back. The end of a prefix goes first, so it is evicted first."""
        for page in reversed(holding.pages):
            self.base.release(page)
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
        self.base.check(holding.pages for holding in holdings)
        self.recent.check([h.recent] for h in holdings if h.recent is not None)
