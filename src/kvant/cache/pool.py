"""The bytes: one region, cut into pages of equal size. Knows nothing of what they mean."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvant.errors import ConfigError
from kvant.memory import huge_memory

__all__ = ["BytePool", "Pool"]


class Pool(Protocol):
    """``num_pages`` pages of ``page_bytes`` bytes, zero until written. ``pages`` is an array,
    uint8 ``[num_pages, page_bytes]``, where the backend works: in memory or on a device."""

    num_pages: int
    page_bytes: int
    pages: Any

    @property
    def nbytes(self) -> int:
        """Size of the whole pool in bytes."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy a whole page, every layer and head of it, before whatever is done next."""
        ...

    def read(self, pages: NDArray[np.int64], start: int, end: int) -> NDArray[np.uint8]:
        """A copy of bytes ``[start, end)`` of some pages; ``[len(pages), end - start]``."""
        ...


class BytePool:
    """A :class:`Pool` in this machine's memory, page-aligned.

    The system commits memory on first write, so an unused pool costs address space only.

    Raises:
        ConfigError: the system does not give that much.
    """

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.num_pages = num_pages
        try:
            flat = huge_memory(num_pages * page_bytes)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"the system refuses a KV cache of {num_pages * page_bytes} bytes ({error}); "
                "give less with kv_memory or kv_tokens"
            ) from None
        self.pages: NDArray[np.uint8] = flat.reshape(num_pages, page_bytes)

    @property
    def nbytes(self) -> int:
        """Size of the whole pool in bytes."""
        return self.num_pages * self.page_bytes

    def copy(self, source: int, target: int) -> None:
        """Copy a whole page, every layer and head of it."""
        self.pages[target] = self.pages[source]

    def read(self, pages: NDArray[np.int64], start: int, end: int) -> NDArray[np.uint8]:
        """See :meth:`Pool.read`."""
        return self.pages[pages, start:end]
