"""``kvant`` that also notes when the engine hands over what, for overhead.py.

    KVANT_STAMPS=FILE python stamped.py serve MODEL ...

At its end FILE has a list of [seed of the sequence, seconds of the monotonic clock that all
processes share, characters]. A note is one append to a list.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from kvant.cli import main
from kvant.request import Output
from kvant.server.running import Courier, Running


def note_deliveries() -> list[tuple[int, float, int]]:
    """From now on, every output that the engine hands to the server."""
    notes: list[tuple[int, float, int]] = []
    plain: Any = Courier.deliver

    def deliver(self: Courier, running: Running, index: int, output: Output) -> None:
        notes.append((running.requests[index].seed, time.perf_counter(), len(output.text)))
        plain(self, running, index, output)

    Courier.deliver = deliver  # type: ignore[method-assign]
    return notes


if __name__ == "__main__":
    found = note_deliveries()
    code = main(sys.argv[1:])
    Path(os.environ["KVANT_STAMPS"]).write_text(json.dumps(found))
    sys.exit(code)
