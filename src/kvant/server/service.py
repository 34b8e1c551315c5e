"""The engine behind the routes: its life from loading to draining, and who is let in."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kvant.engine.engine import CacheMap, Engine, EngineStats
from kvant.errors import EngineDeadError, KvantError, RequestError
from kvant.formats import PAGE_TOKENS
from kvant.request import Request
from kvant.server.config import ServerConfig
from kvant.server.dialects import Dialect, dialect_of
from kvant.server.errors import ApiError
from kvant.server.log import log
from kvant.server.metrics import CacheFacts, Metrics
from kvant.server.running import Courier, Running

if TYPE_CHECKING:
    from kvant.api import Pipeline

__all__ = ["Service", "State"]

T = TypeVar("T")
State = Literal["starting", "ready", "draining", "failed"]

_PREPARING_THREADS = 4
"""Prompts are tokenized, and constraints compiled, beside the loop; these on threads of their own,
so that slow ones hold up nobody else."""
_MOST_COMPILING = 32
"""Constraints that may wait: a slow one takes all of its time-out."""
_ANSWER_SECONDS = 1.0
"""How long /health waits for the engine before it looks at the clock of the step."""
_SNAPSHOT_SECONDS = 0.2
_SNAPSHOT_REQUESTS = 256
_RETRY_SECONDS = 60
"""Most that Retry-After says."""


class _Threads(ThreadPoolExecutor):
    def waiting(self) -> int:
        """Work that no thread has taken yet."""
        return self._work_queue.qsize()


class Service:
    """One engine and all that is asked of it. Its methods are called on the event loop, but for
    :attr:`pipe`, :attr:`dialect` and :meth:`encode`, which any thread may use.

    Args:
        config: resolved options.
        load: makes the pipeline; called on a thread of its own.
        on_failure: called on the loop if it cannot be made.
    """

    def __init__(
        self,
        config: ServerConfig,
        load: Callable[[], Pipeline],
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.model_name = config.model_name or ""
        self.metrics = Metrics(self.model_name)
        self.created = int(time.time())
        self.load_error: Exception | None = None
        self.facts: CacheFacts | None = None
        self._load, self._on_failure = load, on_failure
        self._pipe: Pipeline | None = None
        self._dialect: Dialect | None = None
        self._draining = False
        self._courier: Courier | None = None
        self._threads = _Threads(_PREPARING_THREADS, "kvant-prepare")
        self._compiling = _Threads(_PREPARING_THREADS, "kvant-compile")
        self._active: set[Running] = set()
        self._admitted = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._between_ends = 1.0
        self._last_end = time.monotonic()
        self._snapshot: dict[str, Any] = {}
        self._snapshot_time = -math.inf
        self._snapshot_lock = asyncio.Lock()

    # ------------------------------------------------------------------------------------ life

    @property
    def state(self) -> State:
        """What the server is doing."""
        if self._pipe is None:
            return "draining" if self._draining else "starting"
        if self._pipe.worker.failure is not None:
            return "failed"
        return "draining" if self._draining else "ready"

    def start(self) -> None:
        """Begin to load the model."""
        self._courier = Courier()
        self.metrics.watch_state(lambda: self.state)
        loop = asyncio.get_running_loop()

        def load() -> None:
            try:
                pipe = self._load()
                _warm_up(pipe)
                done: Pipeline | Exception = pipe
            except Exception as error:
                done = error
            with suppress(RuntimeError):  # the server was stopped meanwhile
                loop.call_soon_threadsafe(self._loaded, done)

        threading.Thread(target=load, name="kvant-load", daemon=True).start()

    def _loaded(self, done: Pipeline | Exception) -> None:
        if isinstance(done, Exception):
            self.load_error = done
            self._on_failure()
            return
        model = done.model
        spec, shape = model.kv_spec, model.config.kv_shape
        facts = CacheFacts(
            kv_format=spec.label,
            bytes_per_token=spec.bytes_per_token(shape),
            bytes_per_token_16bit=2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2,
            page_tokens=PAGE_TOKENS,
            pool_bytes=model.cache.nbytes,
            max_running=model.engine.stats().max_running,
            session_len=model.engine.session_len,
        )
        self.metrics.attach(facts, model.engine.stats, lambda: done.worker.step_seconds)
        template = done.chat_template.source if done.chat_template else None
        parser, is_special = self.config.tool_call_parser, done.tokenizer.is_special
        self._dialect = dialect_of(template, parser, is_special)
        self.facts = facts
        self._pipe = done
        log.info(
            "ready: %s, KV %s, %g bytes/token, %d tokens fit, tool calls as %s",
            self.model_name,
            facts.kv_format,
            facts.bytes_per_token,
            model.cache.num_tokens,
            self._dialect.name,
        )

    async def drain(self) -> None:
        """Let nobody in any more, and wait until what runs has ended; what runs when
        ``drain_timeout`` is over is aborted and told so."""
        self._draining = True
        log.info("draining: %d requests run", len(self._active))
        try:
            async with asyncio.timeout(self.config.drain_timeout):
                await self._idle.wait()
        except TimeoutError:
            log.warning("the drain limit is over: %d requests are cut", len(self._active))
            for running in self._active:
                running.abort()
            with suppress(TimeoutError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._idle.wait()

    async def close(self) -> None:
        """Stop the engine."""
        self._draining = True
        for threads in (self._threads, self._compiling):
            threads.shutdown(wait=False, cancel_futures=True)
        if self._pipe is not None:
            await asyncio.to_thread(self._pipe.close)

    # ------------------------------------------------------------------------------------ work

    @property
    def pipe(self) -> Pipeline:
        """The loaded model, for requests that were let in."""
        assert self._pipe is not None, "asked before the model was there"
        return self._pipe

    def check_open(self) -> None:
        """Let a request in, or say why not.

        Raises:
            ApiError: 503, the model is loading, or the server is on its way out.
            EngineDeadError: the engine failed.
        """
        if self._pipe is None and not self._draining:
            raise ApiError(503, "the model is being loaded; try again soon", retry_after=5)
        if self._pipe is None or self._draining:
            self.metrics.rejected("draining")
            raise ApiError(503, "the server is shutting down; ask another", retry_after=5)
        if (failure := self._pipe.worker.failure) is not None:
            raise EngineDeadError(f"the engine failed ({failure}); restart the server")

    @property
    def dialect(self) -> Dialect:
        """How the model writes tool calls and reasoning."""
        assert self._dialect is not None, "asked before the model was there"
        return self._dialect

    def check_model(self, name: str | None) -> None:
        """Raise ApiError 404 if a request names another model."""
        if name is not None and name != self.model_name:
            raise ApiError(
                404,
                f'model "{name[:200]}" is not served here; use "{self.model_name}"',
                param="model",
                code="model_not_found",
            )

    @contextmanager
    def admission(self, count: int) -> Iterator[None]:
        """A place for ``count`` sequences, waiting or running, until the context ends.

        Raises:
            ApiError: 429, the queue is full; 503 as :meth:`check_open` has it.
            EngineDeadError: the engine failed.
        """
        self.check_open()
        most = self.pipe.model.engine.stats().max_running + self.config.max_queue
        if self._admitted + count > most and self._admitted:
            self.metrics.rejected("queue_full")
            seconds = math.ceil(self._between_ends * max(1, self._admitted + count - most))
            raise ApiError(
                429,
                f"{self._admitted} sequences run or wait, and the limit is {most}; try again later",
                retry_after=min(max(seconds, 1), _RETRY_SECONDS),
            )
        self._admitted += count
        self._idle.clear()
        try:
            yield
        finally:
            self._admitted -= count
            if not self._admitted:
                self._idle.set()

    def prepare(self, function: Callable[[], T], *, compiles: bool = False) -> asyncio.Future[T]:
        """Run what takes long beside the loop; ``compiles`` says that it compiles a constraint.
        Cancelled before its turn, it is not run.

        Raises:
            ApiError: 429, too many constraints wait to be compiled.
        """
        if compiles and (waiting := self._compiling.waiting()) >= _MOST_COMPILING:
            self.metrics.rejected("queue_full")
            raise ApiError(
                429,
                f"{_MOST_COMPILING} requests with constraints wait to be compiled, and that is the "
                "limit; try again later",
                retry_after=min(math.ceil(waiting * self.config.grammar_timeout), _RETRY_SECONDS),
            )
        threads = self._compiling if compiles else self._threads
        run = copy_context().run
        return asyncio.get_running_loop().run_in_executor(threads, run, function)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The token ids of a text, on any thread.

        Raises:
            RequestError: it is no valid Unicode, or surely exceeds the context. That is found out
                before it is tokenized, which takes long and a hundred bytes of memory for a token.
        """
        pipe = self.pipe
        limit, longest = pipe.model.engine.session_len, pipe.tokenizer.longest_token
        if len(text) > limit * longest:
            raise RequestError(
                f"the prompt has {len(text)} characters, and the limit is {limit} tokens, each of "
                f"{longest} characters at most: shorten it, or raise session_len or the KV cache's "
                "size"
            )
        return pipe.tokenizer.encode(text, add_special=add_special)

    def run(self, requests: Sequence[Request], arrived: float, *, stream: bool) -> Running:
        """Give requests to the engine; ``arrived`` is when the client asked, by
        ``time.perf_counter``."""
        assert self._courier is not None, "the service was not started"
        running = Running(
            self.pipe.worker,
            self._courier,
            self.metrics,
            requests,
            self._ended,
            arrived=arrived,
            stream=stream,
        )
        self._active.add(running)
        return running

    def _ended(self, running: Running) -> None:
        self._active.discard(running)
        now = time.monotonic()
        pause = min((now - self._last_end) / len(running.requests), _RETRY_SECONDS)
        self._between_ends += 0.1 * (pause - self._between_ends)
        self._last_end = now

    # ------------------------------------------------------------------------------------ reports

    async def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the engine answers, and what to say of it."""
        found: dict[str, Any] = {"status": self.state, "model": self.model_name}
        if self._pipe is None:
            return False, found
        worker = self._pipe.worker
        if worker.failure is not None:
            return False, {**found, "error": worker.failure}
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                stats = await asyncio.wrap_future(worker.ask(lambda engine: engine.stats()))
        except TimeoutError:
            seconds = worker.step_seconds
            found["step_seconds"] = round(seconds, 1)
            if seconds > self.config.stall_timeout:
                return False, {**found, "status": "stalled"}
            return True, found
        except EngineDeadError as error:
            return False, {**found, "status": "failed", "error": str(error)}
        return True, {**found, "running": stats.running, "waiting": stats.waiting}

    async def snapshot(self) -> dict[str, Any]:
        """The cache for the page; see ``/kv`` in docs/server.md."""
        async with self._snapshot_lock:
            age = time.monotonic() - self._snapshot_time
            if self._pipe is None or age > _SNAPSHOT_SECONDS:
                self._snapshot = await self._look()
                self._snapshot_time = time.monotonic()
            return {**self._snapshot, "state": self.state}

    async def _look(self) -> dict[str, Any]:
        uptime = round(time.time() - self.created, 1)
        found: dict[str, Any] = {"model": self.model_name, "uptime_s": uptime}
        if self._pipe is None:
            return found
        assert self.facts is not None, "set with the pipeline"
        try:
            future = self._pipe.worker.ask(_stats_and_map)
            stats, pages = await asyncio.wrap_future(future)
        except EngineDeadError:
            stats = self._pipe.model.engine.stats()
            pages = CacheMap(cached=(), requests=())
        return {**found, **_kv_of(self.facts), **_stats_of(stats), **_map_of(pages)}


def _stats_and_map(engine: Engine) -> tuple[EngineStats, CacheMap]:
    return engine.stats(), engine.cache_map(_SNAPSHOT_REQUESTS)


def _warm_up(pipe: Pipeline) -> None:
    try:
        pipe.guides.warm_up()
    except (KvantError, OSError) as error:
        log.warning("requests with constraints will be refused: %s", error)


def _kv_of(facts: CacheFacts) -> dict[str, Any]:
    return {
        "kv": {
            "label": facts.kv_format,
            "bytes_per_token": facts.bytes_per_token,
            "bytes_per_token_16bit": facts.bytes_per_token_16bit,
            "page_tokens": facts.page_tokens,
        }
    }


def _stats_of(stats: EngineStats) -> dict[str, Any]:
    held, cached, total = stats.pages_held, stats.pages_cached, stats.pages_total
    return {
        "pages": {"total": total, "held": held, "cached": cached, "free": total - held - cached},
        "running": stats.running,
        "waiting": stats.waiting,
        "max_running": stats.max_running,
        "tokens": {
            "prompt": stats.prompt_tokens,
            "cached": stats.cached_tokens,
            "generated": stats.generated_tokens,
        },
        "preemptions": stats.preemptions,
    }


def _map_of(pages: CacheMap) -> dict[str, Any]:
    return {
        "cached": _ranges(pages.cached),
        "requests": [
            {
                "id": held.request_id,
                "status": "running" if held.running else "waiting",
                "prompt_tokens": held.prompt_tokens,
                "generated": held.generated_tokens,
                "cached_tokens": held.cached_tokens,
                "computed": held.computed,
                "pages": _ranges(held.pages),
                "recent": list(held.recent),
            }
            for held in pages.requests
        ],
    }


def _ranges(pages: Iterable[int]) -> list[list[int]]:
    """Runs of consecutive numbers as [first, count]."""
    grouped = itertools.groupby(enumerate(pages), key=lambda item: item[1] - item[0])
    runs = ([page for _, page in group] for _, group in grouped)
    return [[run[0], len(run)] for run in runs]
