"""Who computes what in the next step. One subtraction, no phases, no torch.

A request has tokens and a number of them computed; a step closes part of the gap under a budget
of rows. Decodes are gaps of one, prompts larger gaps taken in chunks. Requests are served in
order of arrival. When pages run out the latest arrival gives its pages up and waits again, to be
recomputed (from the prefix cache as far as its pages survive): nothing fails and no token is
lost, and the oldest request always makes progress.
"""

from __future__ import annotations

import bisect

from kvant.cache.paged import PageCopy, PagedCache
from kvant.engine.plan import Slice, StepPlan
from kvant.request import Request, Status

__all__ = ["Scheduler"]


class Scheduler:
    """Owns the queues of requests and their pages.

    Args:
        cache: the pages.
        max_sequences: most requests that run at a time.
        max_step_tokens: most rows of a step.
    """

    def __init__(self, cache: PagedCache, *, max_sequences: int, max_step_tokens: int) -> None:
        self.cache = cache
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.num_preemptions = 0
        self.max_sequences = max_sequences
        self._max_step_tokens = max_step_tokens

    def add(self, request: Request) -> None:
        """Queue a request by its arrival (its id)."""
        request.status = Status.WAITING
        bisect.insort(self.waiting, request, key=lambda r: r.id)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is, and free what it holds. Safe to repeat."""
        if request.status is Status.RUNNING:
            self.running.remove(request)
            self.cache.release(request.holding)
        elif request.status is Status.WAITING:
            self.waiting.remove(request)
        request.status = Status.FINISHED

    def schedule(self) -> StepPlan | None:
        """Plan the next step, or None if there is nothing to do."""
        slices: list[Slice] = []
        copies: list[PageCopy] = []
        preempted: list[int] = []
        budget = self._max_step_tokens
        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            part = self._grow(request, budget, copies)
            if part is None:
                preempted.append(self._preempt_last())
                continue  # the same request tries again, unless it was the last itself
            slices.append(part)
            budget -= part.end - part.start
            position += 1
        if not preempted:
            self._admit(slices, copies, budget)
        if not slices:
            return None
        return StepPlan(tuple(slices), tuple(copies), tuple(preempted))

    def _grow(self, request: Request, budget: int, copies: list[PageCopy]) -> Slice | None:
        """A slice of at most ``budget`` rows for a running request; None if pages run out."""
        start, length = request.computed, len(request.tokens)
        target = request.fork_at if start < request.fork_at < length else length
        end = self.cache.chunk_end(start, min(target, start + budget), target)
        made = self.cache.reserve(request.holding, start, end)
        if made is None:
            return None
        copies.extend(made)
        return Slice(
            request_id=request.id,
            tokens=tuple(request.tokens[start:end]),
            start=start,
            end=end,
            pages=tuple(request.holding.pages),
            recent=request.holding.recent,
            sample=end == length,
            num_logits=_num_logits(request, end),
        )

    def _preempt_last(self) -> int:
        request = self.running.pop()
        self.cache.release(request.holding)
        request.computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.add(request)
        return request.id

    def _admit(self, slices: list[Slice], copies: list[PageCopy], budget: int) -> None:
        """Start waiting requests, in order, while rows, places and pages for all of their
        tokens last. A request alone in the engine is always started: it fits the pool."""
        missing = self.cache.missing_base_pages
        outstanding = sum(missing(r.holding, len(r.tokens)) for r in self.running)
        for request in list(self.waiting):
            if budget <= 0 or len(self.running) >= self.max_sequences:
                return
            if self._leader_is_ahead(request):
                continue
            self._adopt(request)
            needed = missing(request.holding, len(request.tokens))
            # One page more for each runner, so that decoding on does not preempt at once.
            headroom = outstanding + len(self.running)
            fits = self.cache.base.num_available >= needed + headroom
            part = self._grow(request, budget, copies) if fits or not self.running else None
            if part is None:
                self.cache.release(request.holding)
                request.computed = 0
                return
            self.waiting.remove(request)
            bisect.insort(self.running, request, key=lambda r: r.id)
            request.status = Status.RUNNING
            if not request.num_preemptions:
                request.cached_tokens = part.start
            outstanding += missing(request.holding, len(request.tokens))
            slices.append(part)
            budget -= part.end - part.start

    @staticmethod
    def _leader_is_ahead(request: Request) -> bool:
        """Whether another request is about to compute the beginning of this one too."""
        leader = request.leader
        return (
            leader is not None
            and leader.status is not Status.FINISHED
            and leader.computed < min(request.common, request.adoptable)
        )

    def _adopt(self, request: Request) -> None:
        """Take over pages that hold the beginning of a request: its leader's or cached ones."""
        leader, holding, most = request.leader, request.holding, request.adoptable
        if leader is not None and leader.status is Status.RUNNING and not request.num_generated:
            request.computed = self.cache.adopt_fork(
                holding, leader.holding, leader.computed, min(request.common, most)
            )
        else:
            request.computed = self.cache.adopt_prefix(holding, request.tokens, most)

    def check(self) -> None:
        """Raise AssertionError if queues or pages are inconsistent."""
        self.cache.check(r.holding for r in self.running)
        assert all(r.status is Status.RUNNING for r in self.running)
        assert all(r.status is Status.WAITING for r in self.waiting)
        assert all(not r.holding.pages and r.holding.recent is None for r in self.waiting)
        for queue in (self.running, self.waiting):
            ids = [r.id for r in queue]
            assert ids == sorted(set(ids)), "a queue is out of order"
        for r in self.running:
            assert 0 <= r.computed < len(r.tokens), "a running request has nothing to compute"
            assert len(r.holding.pages) >= self.cache.page_count(r.computed)


def _num_logits(request: Request, end: int) -> int:
    """Rows of logits that are wanted of a slice of a request from ``computed`` to ``end``."""
    if request.wants_all_logits:
        return max(end - max(request.computed, request.logits_from), 0)
    return int(end == len(request.tokens))
