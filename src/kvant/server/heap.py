"""glibc's heap in a process that runs for weeks.

Steps allocate arrays whose sizes change with the batch. glibc keeps what they leave in an arena for
each thread, where it lies in pieces: in four minutes of load the memory of a server of a small
model grew by 4 to 6 % without anything being held (docs/log.md). So there is one arena, and what is
free in it goes back to the system now and then.
"""

from __future__ import annotations

import ctypes
import threading
import time

__all__ = ["settle_heap"]

_ARENA_MAX = -8  # M_ARENA_MAX of malloc.h
_SECONDS = 20.0
"""Between two times. One takes some milliseconds, of a thread that is not the interpreter's."""


def settle_heap() -> None:
    """Keep the heap of this process compact from now on; does nothing where libc is not glibc."""
    try:
        libc = ctypes.CDLL(None)
        mallopt, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return
    mallopt(_ARENA_MAX, 1)

    def run() -> None:
        while True:
            time.sleep(_SECONDS)
            trim(0)

    threading.Thread(target=run, name="kvant-heap", daemon=True).start()
