"""From a memory budget to a number of pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from kvant.errors import ConfigError
from kvant.formats import PAGE_TOKENS, KVShape, KVSpec

__all__ = [
    "CacheSize",
    "free_memory",
    "recent_per_sequence",
    "size_for_bytes",
    "size_for_tokens",
]

# Of a budget in bytes, at most this share goes to recent pages.
_RECENT_SHARE = 0.25
# With a sink, base pages for which one recent page more is there: cached prompts of this length
# keep their first page, without which the others cannot be found.
_PAGES_PER_CACHED_SINK = 32


@dataclass(frozen=True, slots=True)
class CacheSize:
    """Pages of a cache. ``num_tokens`` is what its base pages hold; what sequences keep in recent
    pages comes on top."""

    num_pages: int
    num_recent: int
    nbytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_pages * PAGE_TOKENS


def free_memory() -> int:
    """Bytes that this process may still take: the system's, or its control group's if less.
    Files in the page cache do not count as taken."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            taken = int((group / "memory.current").read_text())
            cached = (group / "memory.stat").read_text().split("inactive_file ")[1].split()[0]
            free = max(0, min(free, int(limit) - taken + int(cached)))
    except (OSError, ValueError, IndexError):
        pass
    return free


def recent_per_sequence(spec: KVSpec) -> int:
    """Recent pages that a running sequence may hold: that of its open group and, with a sink,
    that of its first."""
    return 0 if spec.recent is None else 1 + spec.sink


def _recent_pages(spec: KVSpec, max_sequences: int, num_pages: int) -> int:
    """Recent pages beside ``num_pages`` base pages, where memory is no object."""
    spare = num_pages // _PAGES_PER_CACHED_SINK if spec.sink else 0
    return recent_per_sequence(spec) * max_sequences + spare


def _size(spec: KVSpec, shape: KVShape, num_pages: int, num_recent: int) -> CacheSize:
    nbytes = num_pages * spec.page_bytes(shape) + num_recent * spec.fine.page_bytes(shape)
    return CacheSize(num_pages, num_recent, nbytes)


def size_for_bytes(spec: KVSpec, shape: KVShape, budget: int, max_sequences: int) -> CacheSize:
    """The cache that ``budget`` bytes buy.

    With a recent part, each sequence that runs needs a recent page, with a sink two, so these
    limit how many run at a time; and the sinks of cached prompts need some. They get up to a
    quarter of the budget.

    Raises:
        ConfigError: the budget is too small for a single page.
    """
    num_recent, needed_recent = 0, recent_per_sequence(spec)
    if needed_recent:
        most = min(int(budget * _RECENT_SHARE), budget - spec.page_bytes(shape))
        affordable = most // spec.fine.page_bytes(shape)
        wanted = _recent_pages(spec, max_sequences, budget // spec.page_bytes(shape))
        num_recent = min(wanted, max(needed_recent, affordable))
    rest = budget - num_recent * spec.fine.page_bytes(shape)
    num_pages = rest // spec.page_bytes(shape)
    if num_pages < 1:
        needed = spec.page_bytes(shape) + needed_recent * spec.fine.page_bytes(shape)
        raise ConfigError(
            f"a KV cache of {budget} bytes holds no page of {PAGE_TOKENS} tokens; "
            f"{spec} needs at least {needed} bytes for this model, give more with kv_memory"
        )
    return _size(spec, shape, num_pages, num_recent)


def size_for_tokens(spec: KVSpec, shape: KVShape, tokens: int, max_sequences: int) -> CacheSize:
    """The cache that holds ``tokens`` tokens."""
    num_pages = -(-tokens // PAGE_TOKENS)
    return _size(spec, shape, num_pages, _recent_pages(spec, max_sequences, num_pages))
