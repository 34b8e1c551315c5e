"""CUDA graphs of decode steps: kernels recorded once, for batches of like size, and launched
together.

A step of one row for each of n sequences is rounded up: to a number of rows, whose last ones are
padding that no page holds anything of, and to a number of pages for the longest sequence. Each
such pair is captured when it is first met, over arrays that later batches are loaded into (as in
LMDeploy's and vLLM's engines).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from kvant.kernels.backend import Batch

__all__ = ["ROWS", "Capture", "CudaCapture", "DecodeSteps", "PlanMaker"]

ROWS = (1, 2, 4, *range(8, 257, 8))
"""Rows of captured steps."""

_LEAST_PAGES = 8

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes work on fixed arrays, which has no result, and returns what repeats it."""


class PlanMaker(Protocol):
    """The part of a backend that makes the arrays of padded steps."""

    def decode_plan(self, num_sequences: int, num_pages: int) -> Any:
        """Arrays for up to so many sequences of one row and so many base pages each; its ``load``
        fills them from a batch."""
        ...


class CudaCapture:
    """Captures CUDA graphs, which share one pool of memory: what they compute with is of no use
    once the last kernel has run. All are captured on one stream, as libraries keep a workspace for
    each stream that they ever saw."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run ``work``, so that kernels are compiled and libraries have their workspaces, then
        capture it. It must come to the same however often it runs."""
        here = torch.cuda.current_stream()
        self._aside.wait_stream(here)
        with torch.cuda.stream(self._aside):
            for _ in range(2):
                work()
        here.wait_stream(self._aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._aside, capture_error_mode="thread_local"
        ):
            work()
        self._pool = self._pool or graph.pool()
        replay: Callable[[], None] = graph.replay
        return replay


class DecodeSteps:
    """Decode steps of one model over one backend.

    Args:
        backend: makes plans.
        compute: hidden states ``[n, hidden]`` of the n rows of a plan.
        hidden: where they are kept, ``[most rows, hidden]``.
        capture: see :data:`Capture`.
    """

    def __init__(
        self,
        backend: PlanMaker,
        compute: Callable[[Any], Tensor],
        hidden: Tensor,
        capture: Capture,
    ) -> None:
        self._backend, self._compute = backend, compute
        self._hidden = hidden
        self._capture = capture
        self._rows = [rows for rows in ROWS if rows <= len(hidden)]
        self._steps: dict[tuple[int, int], tuple[Any, Callable[[], None]]] = {}

    @property
    def captured(self) -> list[tuple[int, int]]:
        """Rows and pages of the steps that were captured, in that order."""
        return list(self._steps)

    def run(self, batch: Batch) -> Tensor | None:
        """Hidden states ``[R, hidden]`` of a batch, which the next run overwrites; None if it is
        not one row, whose logits are wanted, of each sequence, or too large."""
        count = len(batch.sequences)
        if not len(batch.tokens) == len(batch.logit_rows) == count <= self._rows[-1]:
            return None
        rows = self._rows[bisect_left(self._rows, count)]
        pages = max(_LEAST_PAGES, *(len(each.pages) for each in batch.sequences))
        self._replay(rows, 1 << (pages - 1).bit_length(), batch)
        return self._hidden[:count]

    def _replay(self, rows: int, pages: int, batch: Batch) -> None:
        if (rows, pages) in self._steps:
            plan, replay = self._steps[rows, pages]
            plan.load(batch)
        else:
            plan = self._backend.decode_plan(rows, pages)
            plan.load(batch)

            def work() -> None:
                self._hidden[:rows].copy_(self._compute(plan))

            replay = self._capture(work)
            self._steps[rows, pages] = plan, replay
        replay()
