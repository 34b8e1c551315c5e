"""What one step does, as plain data: it can be printed, compared, tested and sent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvant.cache.paged import PageCopy
from kvant.cache.pages import PageId
from kvant.formats import PAGE_TOKENS
from kvant.kernels.backend import Batch, BatchSequence

__all__ = ["Slice", "StepPlan", "make_batch"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Compute positions ``[start, end)`` of a request.

    ``pages`` and ``recent`` are what it holds for them (:mod:`kvant.cache.paged`). The logits of
    the last ``num_logits`` rows are wanted; ``sample`` is true when the last row's give the next
    token.
    """

    request_id: int
    tokens: tuple[int, ...]
    start: int
    end: int
    pages: tuple[PageId, ...]
    recent: PageId | None
    sample: bool
    num_logits: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """``copies`` come before any write of the step; ``preempted`` gave their pages up."""

    slices: tuple[Slice, ...]
    copies: tuple[PageCopy, ...] = ()
    preempted: tuple[int, ...] = ()


def _fine_pages(part: Slice, num_recent: int, next_scratch: int, *, sink: bool) -> list[int]:
    """The fine page of each group that a slice touches; see :class:`BatchSequence`.

    The sink's tokens stay in its own page, the open group's in the recent page; a group that
    starts and ends in this slice only passes through scratch.
    """
    first, full = part.start // PAGE_TOKENS, part.end // PAGE_TOKENS
    pages: list[int] = [part.pages[0]] if sink and first == 0 else []
    if part.start % PAGE_TOKENS == 0:
        count = full - first - len(pages)
        pages += range(num_recent + next_scratch, num_recent + next_scratch + count)
    return pages if part.recent is None else [*pages, part.recent]


def make_batch(plan: StepPlan, num_recent: int, *, sink: bool) -> Batch:
    """The arrays of a plan; ``num_recent`` is 0 for a spec without a recent part."""
    sequences, positions, logit_rows = [], [], []
    row = scratch = 0
    for part in plan.slices:
        fine = _fine_pages(part, num_recent, scratch, sink=sink) if num_recent else []
        scratch += sum(page >= num_recent for page in fine)
        count = part.end - part.start
        sequences.append(
            BatchSequence(
                row, part.start, part.end, np.array(part.pages, np.int64), np.array(fine, np.int64)
            )
        )
        positions.append(np.arange(part.start, part.end))
        logit_rows.append(np.arange(row + count - part.num_logits, row + count))
        row += count
    return Batch(
        tokens=np.array([t for part in plan.slices for t in part.tokens], np.int64),
        positions=np.concatenate(positions),
        sequences=tuple(sequences),
        logit_rows=np.concatenate(logit_rows),
    )
