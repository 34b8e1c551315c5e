"""The engine: requests in, one step at a time, outputs out.

Not thread-safe and without a thread of its own; :mod:`kvant.engine.worker` gives it one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from kvant.cache.paged import PagedCache
from kvant.cache.sizing import recent_per_sequence
from kvant.engine.plan import StepPlan, make_batch
from kvant.engine.sampler import Logits, Sampled, sample
from kvant.engine.scheduler import Scheduler
from kvant.errors import RequestError
from kvant.kernels.backend import Backend, Batch, KVMemory
from kvant.request import FinishReason, Output, Request, Status

_log = logging.getLogger("kvant")

__all__ = ["CacheMap", "Engine", "EngineStats", "HeldPages", "Model"]


class Model(Protocol):
    """What the engine needs of a model."""

    def forward(self, batch: Batch, backend: Backend) -> Logits:
        """Compute all rows; logits ``[R, V]`` of ``batch.logit_rows``, good until the next call."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Pages are base pages; token counts are totals since the start."""

    running: int
    waiting: int
    max_running: int
    pages_total: int
    pages_held: int
    pages_cached: int
    steps: int
    preemptions: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldPages:
    """A request and its pages: base pages, and recent ones of the other pool."""

    request_id: int
    running: bool
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    computed: int
    pages: tuple[int, ...]
    recent: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheMap:
    """A snapshot of the base pages: ``cached`` are held by nobody and kept for later prompts; a
    page of several requests is shared; what is left is free."""

    cached: tuple[int, ...]
    requests: tuple[HeldPages, ...]


def _held(request: Request, *, sink: bool) -> HeldPages:
    holding = request.holding
    first = int(sink)  # a sink is a recent page
    recent = (*holding.pages[:first], *(() if holding.recent is None else (holding.recent,)))
    return HeldPages(
        request_id=request.id,
        running=request.status is Status.RUNNING,
        prompt_tokens=request.num_prompt,
        generated_tokens=request.num_generated,
        cached_tokens=request.cached_tokens,
        computed=request.computed,
        pages=tuple(holding.pages[first:]),
        recent=recent,
    )


def _ending(request: Request) -> tuple[FinishReason | None, str | None]:
    """Whether the token that was just appended ends a request, and the error if it is one."""
    if request.text and request.text.stopped is not None:
        return "stop", None
    guide = request.guide
    if guide:
        guide.take(request.tokens[-1])
    if guide and guide.ended:
        return "stop", None
    if len(request.tokens) >= request.max_tokens:
        return "length", None
    if guide and guide.error:
        return "error", guide.error
    return None, None


class Engine:
    """Continuous batching over a paged KV cache.

    Args:
        model: computes logits.
        backend: attention, over ``memory``. Another may take its place between steps.
        memory: the bytes of the cache.
        vocab_size: token ids that the model knows are 0 to one less.
        session_len: longest sequence in tokens; at most what the pool holds.
        max_batch_size: most sequences that run at a time.
        max_step_tokens: most rows of a step.
        prefix_caching: whether prompts share pages of common beginnings.
        check: verify all invariants after every step.
    """

    def __init__(
        self,
        model: Model,
        backend: Backend,
        memory: KVMemory,
        *,
        vocab_size: int,
        session_len: int,
        max_batch_size: int,
        max_step_tokens: int,
        prefix_caching: bool = True,
        check: bool = False,
    ) -> None:
        self.memory = memory
        self.vocab_size = vocab_size
        self.session_len = session_len
        self._model = model
        self.backend = backend
        self._cache = PagedCache(
            memory.base.num_pages,
            memory.recent.num_pages,
            sink=memory.spec.sink,
            prefix_caching=prefix_caching,
        )
        if each := recent_per_sequence(memory.spec):
            max_batch_size = min(max_batch_size, memory.recent.num_pages // each)
        self.scheduler = Scheduler(
            self._cache, max_sequences=max_batch_size, max_step_tokens=max_step_tokens
        )
        self._requests: dict[int, Request] = {}
        self._check = check
        self._steps = self._prompt_tokens = self._cached_tokens = self._generated_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._requests)

    def validate(self, prompt: Sequence[int], *, generate: bool = True) -> None:
        """Raise RequestError if a prompt cannot be served at all; without ``generate`` only its
        logits are wanted."""
        if not prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if len(prompt) + generate > self.session_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and the limit is {self.session_len}"
                f"{' with one to generate' if generate else ''}: shorten it, or raise session_len "
                "or the KV cache's size"
            )
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise RequestError(
                    f"the prompt has token id {token!r}, and the model knows 0 to "
                    f"{self.vocab_size - 1}; leave it out"
                )

    def submit(self, request: Request) -> None:
        """Queue a request; its outputs go to ``request.deliver``, the last one with a
        ``finish_reason``. Prompts must have passed :meth:`validate`."""
        self._requests[request.id] = request
        self.scheduler.add(request)
        self._prompt_tokens += request.num_prompt

    def abort(self, request_id: int) -> None:
        """End a request now and free what it holds. Does nothing if it has ended."""
        if request := self._requests.get(request_id):
            self._finish(request, Output(finish_reason="abort"))

    def abort_all(self) -> None:
        """End every request."""
        for request_id in list(self._requests):
            self.abort(request_id)

    def fail_all(self, error: str) -> None:
        """End every request with an error."""
        last = Output(finish_reason="error", error=error)
        for request in list(self._requests.values()):
            try:
                self._finish(request, last)
            except Exception:  # what failed may have left queues and pages in disorder
                self._requests.pop(request.id, None)
                self._deliver(request, last)

    def clear_prefix_cache(self) -> None:
        """Forget cached prefixes that no running request holds."""
        self._cache.base.clear_cached()
        self._cache.recent.clear_cached()

    def step(self) -> StepPlan | None:
        """Plan, compute, sample, commit. Returns what was done, None if there was nothing."""
        plan = self.scheduler.schedule()
        if plan is None:
            return None
        self._stamp(plan)
        for copy in plan.copies:
            pool = self.memory.recent if copy.recent else self.memory.base
            pool.copy(copy.source, copy.target)
        batch = make_batch(plan, self.memory.recent.num_pages, sink=self.memory.spec.sink)
        self._commit(plan, self._model.forward(batch, self.backend))
        self._steps += 1
        if self._check:
            self.scheduler.check()
        return plan

    def _stamp(self, plan: StepPlan) -> None:
        now = time.perf_counter()
        for part in plan.slices:
            request = self._requests[part.request_id]
            if request.started is None:
                request.started = now

    def cache_map(self, most: int) -> CacheMap:
        """Who holds which pages, for at most ``most`` requests, those that run first."""
        requests = [*self.scheduler.running, *self.scheduler.waiting][:most]
        return CacheMap(
            cached=self._cache.base.cached_pages(),
            requests=tuple(_held(request, sink=self._cache.sink) for request in requests),
        )

    def stats(self) -> EngineStats:
        """A snapshot of queues, pages and totals."""
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting),
            max_running=self.scheduler.max_sequences,
            pages_total=self._cache.base.num_pages,
            pages_held=self._cache.base.num_held,
            pages_cached=self._cache.base.num_cached,
            steps=self._steps,
            preemptions=self.scheduler.num_preemptions,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
        )

    def _commit(self, plan: StepPlan, logits: Logits) -> None:
        row = 0
        sampling: list[Request] = []
        rows: list[int] = []
        for part in plan.slices:
            wanted = slice(row, row + part.num_logits)
            row = wanted.stop
            request = self._requests.get(part.request_id)
            if request is None:  # a receiver of this step aborted it
                continue
            request.computed = part.end
            self._cache.commit(request.holding, request.tokens, part.end)
            start = part.end - part.num_logits
            if not self._sink(request, start, logits, wanted) or not part.sample:
                continue
            if request.max_tokens == request.num_prompt:  # only its logits were wanted
                self._finish(request, Output(finish_reason="length"))
            else:
                sampling.append(request)
                rows.append(row - 1)
        if sampling:
            for request, sampled in zip(sampling, sample(logits, rows, sampling), strict=True):
                if request.status is not Status.FINISHED:
                    self._append(request, sampled)

    def _sink(self, request: Request, start: int, logits: Logits, rows: slice) -> bool:
        """Hand ``rows`` of logits over if they are wanted; False if the receiver failed, which
        ends its request and no other."""
        if request.logits_sink is None or rows.start == rows.stop:
            return True
        wanted = logits.fetch(rows)
        try:
            request.logits_sink(start, wanted)
        except Exception as error:
            _log.exception("request %d: its receiver of logits failed", request.id)
            self._finish(request, Output(finish_reason="error", error=f"logits: {error!r}"))
            return False
        return True

    def _deliver(self, request: Request, output: Output) -> None:
        """Hand an output over. A receiver that fails loses its request, nobody else's."""
        try:
            request.deliver(output)
        except Exception:
            _log.exception("request %d: its receiver failed; it is aborted", request.id)
            self.abort(request.id)

    def _append(self, request: Request, sampled: Sampled) -> None:
        token = sampled.token
        if token is None:
            error = (
                "no token can be chosen: the logits are not finite, or all tokens are banned"
                f"{' that response_format allows' if request.guide else ''}; "
                "try dtype=float32 or a KV format of more bits"
            )
            self._finish(request, Output(finish_reason="error", error=error))
            return
        request.append(token)
        self._generated_tokens += 1
        logprobs = (sampled.logprobs,) if sampled.logprobs is not None else ()
        if token in request.stop_ids:
            self._finish(request, Output(finish_reason="stop"))
            return
        try:
            text = request.text.push(token) if request.text else ""
            reason, problem = _ending(request)
        except Exception as error:
            _log.exception("request %d: its detokenizer or constraint failed", request.id)
            self._finish(request, Output(finish_reason="error", error=f"the text: {error!r}"))
            return
        output = Output(text, (token,), logprobs, reason, problem)
        if reason:
            self._finish(request, output)
        else:
            self._deliver(request, output)

    def _finish(self, request: Request, last: Output) -> None:
        if request.status is Status.FINISHED:
            return
        self.scheduler.remove(request)
        del self._requests[request.id]
        self._cached_tokens += request.cached_tokens
        try:
            tail = request.text.finish() if request.text else ""
        except Exception:
            _log.exception("request %d: its detokenizer failed; its last text is lost", request.id)
            tail = ""
        self._deliver(request, replace(last, text=last.text + tail))
