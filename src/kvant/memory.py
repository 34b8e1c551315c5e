"""Large pieces of memory."""

from __future__ import annotations

import mmap
from contextlib import suppress
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Arena", "huge_memory"]

# Shared memory, Python's default, has no huge pages.
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_CHUNK = 32 << 20
_LINE = 64


def huge_memory(nbytes: int) -> NDArray[np.uint8]:
    """``nbytes`` zeros, page-aligned, in huge pages where the system has them: with small ones the
    processor looks up more addresses than it reads lines. Committed on first write.

    Raises:
        OSError, OverflowError: the system does not give that much.
    """
    region = mmap.mmap(-1, max(nbytes, 1), flags=_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            region.madvise(mmap.MADV_HUGEPAGE)
    flat: NDArray[Any] = np.frombuffer(region, np.uint8)
    return flat[:nbytes]


class Arena:
    """Gives parts of large regions away, which live as long as any part of theirs."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._rest = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """``nbytes`` zeros that begin with a line of the cache. Thread-safe; raises as
        :func:`huge_memory`."""
        size = -(-nbytes // _LINE) * _LINE
        with self._lock:
            if len(self._rest) < size:
                self._rest = huge_memory(max(size, _CHUNK))
            part, self._rest = self._rest[:nbytes], self._rest[size:]
        return part
