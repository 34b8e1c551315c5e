"""From the engine's thread to the event loop: outputs of requests, and their times.

The engine hands over an output for every sequence of a step. They are put into one queue, and the
loop is woken once for all: a wake-up is a system call, and a step has many outputs.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial

from kvant.engine.worker import EngineWorker
from kvant.request import Output, Request
from kvant.server.metrics import Finished, Metrics

__all__ = ["Courier", "Running"]


class Courier:
    """Carries outputs to the loop that made it."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Running, int, Output, float]] = deque()
        self._called = False

    def deliver(self, running: Running, index: int, output: Output) -> None:
        """Called on the engine's thread."""
        self._queue.append((running, index, output, time.perf_counter()))
        if not self._called:
            self._called = True
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        self._called = False  # before the queue is emptied: what comes later calls again
        while self._queue:
            running, index, output, when = self._queue.popleft()
            running.receive(index, output, when)


class Running:
    """The sequences of one API request in the engine. Iterate :meth:`events` once.

    Args:
        worker: the engine, which gets them at once.
        requests: the sequences.
        on_end: called when the last one has ended.
        arrived: when the client asked, in seconds of ``time.perf_counter``.
        stream: whether :meth:`events` tells of outputs as they come, or of all at the end.

    Raises:
        EngineDeadError: the engine failed or was closed.
    """

    def __init__(
        self,
        worker: EngineWorker,
        courier: Courier,
        metrics: Metrics,
        requests: Sequence[Request],
        on_end: Callable[[Running], None],
        *,
        arrived: float,
        stream: bool,
    ) -> None:
        self.requests = list(requests)
        self._asked, self._stream = arrived, stream
        self._worker = worker
        self._metrics = metrics
        self._on_end = on_end
        self._first: list[float | None] = [None] * len(self.requests)
        self._last = [0.0] * len(self.requests)
        self._open = set(range(len(self.requests)))
        self._arrived: list[tuple[int, Output]] = []
        self._ready = asyncio.Event()
        for index, request in enumerate(self.requests):
            request.deliver = partial(courier.deliver, self, index)
        worker.submit(self.requests)

    def receive(self, index: int, output: Output, when: float) -> None:
        """Take an output, on the loop."""
        self._arrived.append((index, output))
        if self._stream or output.finish_reason in ("error", "abort"):
            self._ready.set()
        if output.token_ids:
            if self._first[index] is None:
                self._first[index] = when
                self._metrics.first_token(when - self._asked)
            else:
                self._metrics.tokens_came(when - self._last[index], len(output.token_ids))
            self._last[index] = when
        if output.finish_reason is not None:
            self._open.discard(index)
            self._count(index, output, when)
            self.requests[index].deliver = _ignore  # no cycle is left for the garbage collector
            if not self._open:
                self._ready.set()
                self._on_end(self)

    async def events(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """What has come since the last time: for each sequence at most one output."""
        left = set(range(len(self.requests)))
        while left:
            await self._ready.wait()
            self._ready.clear()
            arrived, self._arrived = self._arrived, []
            arrived = _merged(arrived)
            left -= {index for index, output in arrived if output.finish_reason is not None}
            yield arrived

    def abort(self) -> None:
        """End what still runs; pages are free before the next step."""
        for index in self._open:
            self._worker.abort(self.requests[index])

    def _count(self, index: int, output: Output, when: float) -> None:
        request = self.requests[index]
        first, started = self._first[index], request.started
        self._metrics.finished(
            Finished(
                reason=output.finish_reason or "error",
                prompt_tokens=request.num_prompt,
                cached_tokens=request.cached_tokens,
                generated_tokens=request.num_generated,
                queue_s=None if started is None else started - self._asked,
                prefill_s=None if started is None or first is None else first - started,
                decode_s=None if first is None else when - first,
                e2e_s=when - self._asked,
                preemptions=request.num_preemptions,
                max_tokens=request.gen.max_new_tokens,
                n=request.gen.n,
            )
        )


def _ignore(output: Output) -> None:
    """Nothing follows a last output."""


def _merged(arrived: list[tuple[int, Output]]) -> list[tuple[int, Output]]:
    """Outputs of one sequence as one: the loop was busy while several came."""
    indices = [index for index, _ in arrived]
    if len(set(indices)) == len(indices):
        return arrived
    by_index: dict[int, list[Output]] = {}
    for index, output in arrived:
        by_index.setdefault(index, []).append(output)
    return [(index, _joined(outputs)) for index, outputs in by_index.items()]


def _joined(outputs: Sequence[Output]) -> Output:
    return Output(
        text="".join(output.text for output in outputs),
        token_ids=tuple(token for output in outputs for token in output.token_ids),
        logprobs=tuple(each for output in outputs for each in output.logprobs),
        finish_reason=outputs[-1].finish_reason,
        error=outputs[-1].error,
    )
