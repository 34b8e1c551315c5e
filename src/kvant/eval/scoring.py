"""Log-likelihoods and continuations of many prompts, with what they have in common computed once.

Requests go to the engine in the order of their tokens, so that those with a common beginning are
neighbours: the first one computes it, the others wait that long and share its pages. Continuations
of one context part at its last token (the leader makes a halt there), different contexts under one
few-shot header at a page border.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, takewhile
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kvant.api import Pipeline
from kvant.config import GenerationConfig
from kvant.errors import KvantError, RequestError
from kvant.formats import PAGE_TOKENS
from kvant.request import Output, Request

__all__ = ["Likelihood", "Scorer"]

_log = logging.getLogger("kvant")

T = TypeVar("T")

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context and of a continuation."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """Of a continuation: its log-probability in nats, and whether greedy decoding writes it."""

    logprob: float
    greedy: bool


@dataclass(slots=True, eq=False)
class _Scores:
    """Some tokens at the end of a sequence, each with its log-probability; a
    :class:`kvant.request.LogitsSink`. ``wanted`` are the tokens to look up at a position, several
    if continuations differ there. Positions that come again replace what was there."""

    first: int
    wanted: dict[int, dict[int, tuple[float, bool]]] = field(default_factory=dict)

    def __call__(self, start: int, logits: NDArray[np.float32]) -> None:
        for position, tokens in self.wanted.items():
            row = position - start
            if 0 <= row < len(logits):
                _look_up(logits[row], tokens)

    def of(self, continuation: Sequence[int]) -> Likelihood:
        found = [self.wanted[self.first + i][token] for i, token in enumerate(continuation)]
        return Likelihood(sum(each[0] for each in found), all(each[1] for each in found))


def _look_up(logits: NDArray[np.float32], tokens: dict[int, tuple[float, bool]]) -> None:
    """Put the log-probability of each token there, and whether it is the likeliest."""
    top = int(logits.argmax())
    norm = np.log(np.exp(logits - logits[top]).sum(dtype=np.float64))
    for token in tokens:
        tokens[token] = float(np.float64(logits[token]) - logits[top] - norm), top == token


@dataclass(slots=True)
class _Work:
    """A sequence to compute, with the continuations that it scores: (index, token ids)."""

    ids: tuple[int, ...]
    first: int
    continuations: list[tuple[int, Sequence[int]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores and generates with one engine."""

    pipe: Pipeline

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens."""
        return self.pipe.model.engine.session_len

    @property
    def _places(self) -> int:
        return self.pipe.model.engine.scheduler.max_sequences

    def loglikelihoods(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, Likelihood]]:
        """The index and the likelihood of each pair, as they are done. Of a pair that is too long
        the beginning is left out, as lm-eval does.

        Raises:
            RequestError: a context or a continuation is empty, or a continuation alone too long.
            KvantError: the engine failed.
        """
        # Not more than can run at a time: whoever waits for a place misses its leader's halt.
        for work, _ in self._run(self._score_requests(self._plan(pairs)), self._places):
            scores, waiting = work
            for index, continuation in waiting:
                yield index, scores.of(continuation)

    def generate(
        self, prompts: Sequence[tuple[Sequence[int], GenerationConfig]]
    ) -> Iterator[tuple[int, str]]:
        """The index and the text of each prompt, as they are done. Of a prompt that leaves no room
        for ``max_new_tokens`` the beginning is left out, as lm-eval does.

        Raises:
            RequestError: a prompt is empty, or ``max_new_tokens`` alone too many.
            KvantError: the engine failed.
        """
        room = [self.max_length - gen.max_new_tokens for _, gen in prompts]
        cut = [len(ids) > most for (ids, _), most in zip(prompts, room, strict=True)]
        self._warn(sum(cut), len(prompts))
        order = sorted(range(len(prompts)), key=lambda i: tuple(prompts[i][0]))
        yield from self._run(self._generate_requests(prompts, order), 2 * self._places)

    def _plan(self, pairs: Sequence[Pair]) -> list[_Work]:
        """What to compute, in order of the contexts. Continuations that differ in their last token
        only are one sequence."""
        found: dict[tuple[tuple[int, ...], int], _Work] = {}
        cut = 0
        for index, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise RequestError(f"pair {index} has an empty context or continuation")
            if len(continuation) > self.max_length:
                raise RequestError(
                    f"a continuation has {len(continuation)} tokens, and the limit is "
                    f"{self.max_length}; raise session_len or the KV cache's size"
                )
            cut += len(context) + len(continuation) - 1 > self.max_length
            ids = (*context, *continuation)[-self.max_length - 1 : -1]
            first = len(ids) - len(continuation)
            work = found.setdefault((ids, first), _Work(ids, first))
            work.continuations.append((index, continuation))
        self._warn(cut, len(pairs))
        return sorted(found.values(), key=lambda work: (work.ids[: work.first + 1], work.ids))

    def _warn(self, cut: int, count: int) -> None:
        if cut:
            _log.warning(
                "%d of %d prompts are longer than %d tokens and lose their beginning; raise "
                "session_len or the KV cache's size",
                cut, count, self.max_length,
            )  # fmt: skip

    def _score_requests(
        self, plan: Sequence[_Work]
    ) -> Iterator[tuple[tuple[_Scores, list[tuple[int, Sequence[int]]]], Request]]:
        head: Request | None = None  # the first request of the current context
        for number, work in enumerate(plan):
            scores = _Scores(work.first)
            for _, continuation in work.continuations:
                for place, token in enumerate(continuation):
                    scores.wanted.setdefault(work.first + place, {})[token] = (-np.inf, False)
            request = self.pipe.score_request(work.ids, scores, first=work.first)
            context = work.ids[: work.first + 1]
            if head is not None and tuple(head.tokens[: head.logits_from + 1]) == context:
                request.leader, request.common = head, work.first
            else:
                _follow(request, head)
                head = request
                follower = plan[number + 1] if number + 1 < len(plan) else None
                if follower is not None and follower.ids[: follower.first + 1] == context:
                    request.fork_at = work.first
            yield (scores, work.continuations), request

    def _generate_requests(
        self, prompts: Sequence[tuple[Sequence[int], GenerationConfig]], order: Sequence[int]
    ) -> Iterator[tuple[int, Request]]:
        before: Request | None = None
        for index in order:
            ids, gen = prompts[index]
            room = self.max_length - gen.max_new_tokens
            if room < 1:
                raise RequestError(
                    f"max_new_tokens={gen.max_new_tokens} leaves no room for a prompt in "
                    f"{self.max_length} tokens; raise session_len or the KV cache's size"
                )
            (request,) = self.pipe.generate_requests(ids[-room:], gen)
            _follow(request, before)
            before = request
            yield index, request

    def _run(self, requests: Iterable[tuple[T, Request]], most: int) -> Iterator[tuple[T, str]]:
        """Keep the engine busy with at most ``most`` requests; what belongs to a request, and its
        text, when it is done."""
        source = iter(requests)
        arrived: queue.SimpleQueue[tuple[Request, Output]] = queue.SimpleQueue()
        running: dict[int, tuple[T, Request, list[str]]] = {}
        try:
            while True:
                if len(running) <= most // 2:
                    fresh = list(islice(source, most - len(running)))
                    for key, request in fresh:
                        running[request.id] = (key, request, [])
                        request.deliver = partial(_put, arrived, request)
                    self.pipe.worker.submit([request for _, request in fresh])
                if not running:
                    return
                request, output = arrived.get()
                running[request.id][2].append(output.text)
                if output.finish_reason in ("error", "abort"):
                    raise KvantError(output.error or "the request was aborted")
                if output.finish_reason:
                    request.leader = None  # chains of leaders would keep all requests
                    key, _, pieces = running.pop(request.id)
                    yield key, "".join(pieces)
        finally:
            for _, request, _ in running.values():
                self.pipe.worker.abort(request)


def _put(
    arrived: queue.SimpleQueue[tuple[Request, Output]], request: Request, output: Output
) -> None:
    arrived.put((request, output))


def _follow(request: Request, before: Request | None) -> None:
    """Let a request wait for the pages that it has in common with the one before."""
    if before is not None:
        pairs = zip(request.tokens, before.tokens, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if common := same - same % PAGE_TOKENS:
            request.leader, request.common = before, common
