"""One engine that waits for work: what the throughput scripts of all engines share. Only stdlib.

``throughput.py`` starts them, one process for each row (kvant: one for all its rows). A worker
loads its model, says what it is and which rows it has in a line of JSON, then answers each line
``{"row", "prompts", "new"}`` with ``{"seconds", "tokens"}``: the time from all prompts to all
answers, and the answers' token ids. Between lines it sleeps. Rows are named ``WEIGHTS/KV``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

Ids = list[list[int]]
Run = Callable[[Ids, int], Ids]
"""Continues prompts greedily by a number of tokens, end tokens or not."""


class Worker(NamedTuple):
    """``runs`` by row. ``about``: what rows say of the engine."""

    runs: dict[str, Run]
    version: str
    about: str


def options(description: str | None, formats: bool = True) -> argparse.ArgumentParser:
    """Options of a worker, with those of its one row or without."""
    out = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    out.add_argument("--data", type=Path, required=True, help="the folder prepare.py made")
    if formats:
        out.add_argument("--weights", required=True)
        out.add_argument("--kv", required=True)
    out.add_argument("--requests", type=int, required=True, help="most prompts at a time")
    out.add_argument("--tokens", type=int, required=True, help="longest sequence")
    out.add_argument("--threads", type=int, default=2)
    return out


def serve(start: Callable[[], Worker]) -> None:
    """Work until standard input ends. What engines print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = start()

    def say(**facts: object) -> None:
        print(json.dumps(facts), file=answers, flush=True)

    say(rows=list(worker.runs), version=worker.version, about=worker.about)
    for line in sys.stdin:
        work = json.loads(line)
        began = time.perf_counter()
        tokens = worker.runs[work["row"]](work["prompts"], work["new"])
        say(seconds=time.perf_counter() - began, tokens=tokens)
