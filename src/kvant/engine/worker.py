"""A thread that owns an engine, and a thread-safe way in: submit, abort, stream.

All work on the engine happens on its thread; other threads leave commands and receive outputs
through each request's ``deliver``. Every submitted request gets a last output with a
``finish_reason``, also when the engine fails or is closed.
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from kvant.engine.engine import Engine
from kvant.errors import EngineDeadError
from kvant.request import Output, Request

__all__ = ["EngineWorker", "Stream"]

T = TypeVar("T")

_Command = Callable[[], None]


def _text(error: BaseException) -> str:
    kind = type(error).__name__
    if kind == "OutOfMemoryError":  # torch's, known by its name: torch takes seconds to import
        reason = str(error).partition("\n")[0].partition(" GPU ")[0]
        return (
            f"a step found no memory ({reason}); lower cache_max_entry_count or "
            "max_prefill_token_num"
        )
    return f"{kind}: {error}"


class Stream:
    """The outputs of one request, which making a stream submits. Iterate it (or ``async for``)
    once, on any thread; leaving early aborts the request.

    Raises:
        EngineDeadError: the engine failed or was closed.
    """

    def __init__(self, worker: EngineWorker, request: Request) -> None:
        self.request = request
        self._worker = worker
        self._outputs: queue.SimpleQueue[Output] = queue.SimpleQueue()
        self._wake: Callable[[], None] | None = None
        request.deliver = self._deliver
        worker.submit([request])

    def _deliver(self, output: Output) -> None:
        self._outputs.put(output)
        wake = self._wake  # the reader may take it away meanwhile
        if wake is not None:
            wake()

    def abort(self) -> None:
        """End the request; the stream still gets its last output."""
        self._worker.abort(self.request)

    def get(self, timeout: float | None = None) -> Output:
        """The next output; raises ``queue.Empty`` after ``timeout`` seconds."""
        return self._outputs.get(timeout=timeout)

    def __iter__(self) -> Iterator[Output]:
        done = False
        try:
            while not done:
                output = self.get()
                done = output.finish_reason is not None
                yield output
        finally:
            if not done:
                self.abort()

    async def __aiter__(self) -> AsyncIterator[Output]:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:  # the loop was closed: nobody listens any more
                self._wake = None

        self._wake = wake
        done = False
        try:
            while not done:
                try:
                    output = self._outputs.get_nowait()
                except queue.Empty:
                    await ready.wait()
                    ready.clear()
                    continue
                done = output.finish_reason is not None
                yield output
        finally:
            self._wake = None
            if not done:
                self.abort()


class EngineWorker:
    """Runs ``engine.step()`` while there is work. Usable from any thread, and as a context
    manager."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._ids = itertools.count()
        self._lock = threading.RLock()  # a signal handler may close while its thread submits
        self._closed = False
        self._failure: BaseException | None = None
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="kvant-engine", daemon=True)
        self._thread.start()
        # Python must not shut down while the thread is inside of torch: that aborts the process.
        atexit.register(self.close)

    @property
    def is_alive(self) -> bool:
        """Whether requests are still taken."""
        return not self._closed and self._failure is None

    @property
    def failure(self) -> str | None:
        """Why the engine failed, if it did."""
        return None if self._failure is None else _text(self._failure)

    @property
    def step_seconds(self) -> float:
        """How long the step that runs now has taken; 0 between steps."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def new_id(self) -> int:
        """An id for the next request; ids are the order of arrival."""
        return next(self._ids)

    def submit(self, requests: list[Request]) -> None:
        """Queue requests, in order; their outputs go to ``request.deliver``, on the engine's
        thread, which must not block.

        Raises:
            EngineDeadError: the engine failed or was closed.
        """

        def submit_all() -> None:
            for request in requests:
                self._engine.submit(request)

        self._put(submit_all)

    def abort(self, request: Request) -> None:
        """End a request soon; does nothing if it has ended."""
        self._commands.put(lambda: self._engine.abort(request.id))

    def call(self, function: Callable[[Engine], T]) -> T:
        """Run ``function(engine)`` on the engine's thread, between steps, and wait for it.

        Raises:
            EngineDeadError: the engine failed or was closed.
        """
        return self.ask(function).result()

    def ask(self, function: Callable[[Engine], T]) -> Future[T]:
        """:meth:`call` without waiting. A call that was cancelled before its turn is not made."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._engine))
            except BaseException as error:
                future.set_exception(error)

        self._put(run)
        return future

    def _put(self, command: _Command) -> None:
        with self._lock:
            if self._failure is not None:
                raise EngineDeadError(
                    f"the engine failed ({_text(self._failure)}); start a new one"
                ) from self._failure
            if self._closed:
                raise EngineDeadError("the engine is closed; start a new one")
            self._commands.put(command)

    def close(self) -> None:
        """Abort what runs and stop the thread. Safe to repeat."""
        with self._lock:
            self._closed = True
        self._commands.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self.close)

    def __enter__(self) -> EngineWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while not self._closed:
                self._obey(block=not self._engine.has_work)
                self._busy_since = time.monotonic()
                self._engine.step()
                self._busy_since = None
            self._obey(block=False)
            self._engine.abort_all()
        except BaseException as error:
            with self._lock:
                self._failure = error
            while not self._commands.empty():  # one that fails keeps no other from its turn
                with suppress(Exception):
                    self._commands.get()()
            self._busy_since = None
            self._engine.fail_all(f"the engine failed: {_text(error)}")

    def _obey(self, *, block: bool) -> None:
        """Run the commands that wait; with ``block`` wait for one first."""
        try:
            while True:
                self._commands.get(block=block)()
                block = False
        except queue.Empty:
            pass
