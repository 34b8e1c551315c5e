"""Requests to an OpenAI-compatible server at times that its answers have no influence on.

The loop is open: a request is sent when it is due, however many are still running. So a server
that is too slow is seen to be so, in the time that requests wait. All times of a request count from
when it was due, also if the client was late or held it back (``max_concurrency``).

Chunks of a stream are stamped when they are read. How many tokens they hold is known at the end,
from the server's usage; :meth:`Transcript.timeline` says what is made of it.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import aiohttp
import numpy as np

from kvant.bench.metrics import Timeline, latencies, significant
from kvant.bench.workload import Codec, Work
from kvant.client import Events, error_text, message_of, reason, unreachable
from kvant.errors import ConfigError, KvantError

__all__ = [
    "Exchange",
    "Load",
    "Run",
    "Server",
    "Slo",
    "Transcript",
    "arrival_times",
    "find_model",
    "measure",
    "open_loop",
]

Row = dict[str, Any]
"""A row of results; docs/bench.md says what each key means."""

_WARM_PROMPT, _WARM_OUTPUT = 8, 4  # tokens: less than servers keep for later prompts
# A server closes connections that nothing came through for some seconds; a request sent at that
# moment would fail.
_KEEP_ALIVE = 1.0
_PATIENCE = 10.0  # seconds for the list of models

# All that must be known of a chunk when it comes. A quote inside of a text is escaped, so none of
# these is ever found there.
_TEXT = re.compile(rb'"(?:text|content|reasoning_content|reasoning)"\s*:\s*"(?!")')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_ERROR = re.compile(rb'\{\s*"error"\s*:')


def arrival_times(
    count: int, rate: float, *, burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """When requests are due, in seconds since the first.

    Args:
        count: how many.
        rate: requests per second on average; inf for all at once. Times of another rate are the
            same but for this factor.
        burstiness: shape of the gamma distribution of gaps; 1 is a Poisson process, less comes in
            bursts, more is regular.
        seed: same seed, same times.

    Raises:
        ConfigError: a value out of range.
    """
    if not rate > 0:
        raise ConfigError(f"request_rate={rate:g} must be above 0; inf is all at once")
    if not 0 < burstiness < math.inf:
        raise ConfigError(f"burstiness={burstiness:g} must be above 0; 1 is a Poisson process")
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / burstiness, count - 1)
    times: list[float] = (np.concatenate([[0.0], np.cumsum(gaps)]) / rate).tolist()
    return times


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request must keep to be good: milliseconds by ``ttft``, ``tpot``, ``e2e``."""

    limits: Mapping[str, float]

    @classmethod
    def parse(cls, text: str) -> Slo:
        """From ``ttft:500,tpot:50``.

        Raises:
            ConfigError: it is of another kind.
        """
        limits: dict[str, float] = {}
        for piece in text.split(","):
            name, _, value = (word.strip() for word in piece.partition(":"))
            try:
                limits[name] = float(value)
            except ValueError:
                limits[name] = math.nan
            if name not in ("ttft", "tpot", "e2e") or not 0 < limits[name] < math.inf:
                raise ConfigError(
                    f'slo "{piece}" must be ttft, tpot or e2e, a colon and milliseconds, as '
                    "ttft:500,tpot:50,e2e:10000"
                )
        return cls(limits)

    def met_by(self, line: Timeline) -> bool:
        """Whether a request kept all limits."""
        values = {"ttft": [line.ttft], "tpot": line.tpot, "e2e": [line.e2e]}
        return all(
            1e3 * value <= limit for name, limit in self.limits.items() for value in values[name]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server and how it is asked.

    Args:
        url: without ``/v1``.
        model: the model's name there.
        chat: ask for chat completions instead of completions.
        prompt_ids: send token ids, not text; completions only.
        ignore_eos: ask for the exact number of tokens.
        extra: fields of the body that are added to it or replace its own.
        headers: of all requests.
        timeout: seconds that a request may take.
    """

    url: str
    model: str = ""
    chat: bool = False
    prompt_ids: bool = False
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout: float = 600.0

    @property
    def endpoint(self) -> str:
        """Where requests go."""
        return f"{self.url}/v1/{'chat/' if self.chat else ''}completions"

    def body(self, work: Work, codec: Codec) -> bytes:
        """A request as it is sent."""
        prompt = work.prompt if self.prompt_ids else codec.decode(work.prompt)
        asked: dict[str, Any] = {"prompt": prompt}
        if self.chat:
            asked = {"messages": [{"role": "user", "content": prompt}]}
        body = {
            "model": self.model,
            **asked,
            "max_tokens": work.output_len,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
            **self.extra,
        }
        return json.dumps(body, ensure_ascii=False).encode(errors="replace")

    def session(self) -> aiohttp.ClientSession:
        """As many connections as there are requests."""
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE),
            timeout=aiohttp.ClientTimeout(total=self.timeout),
            headers={"Content-Type": "application/json", **self.headers},
        )


class Transcript:
    """A stream as it comes: when its chunks with text came, how it ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.done = False
        self.error: bytes | None = None
        self._events = Events()
        self._finished = self._last = 0.0
        self._usage: bytes | None = None

    def feed(self, data: bytes, now: float) -> None:
        """A piece of the stream and when it was read."""
        self._last = now
        for event in self._events.feed(data):
            if event == b"[DONE]":
                self.done = True
            elif _ERROR.match(event):
                self.error = event
            else:
                self._note(event, now)

    def _note(self, event: bytes, now: float) -> None:
        if _TEXT.search(event):
            self.times.append(now)
        if _FINISH.search(event):
            self._finished = now
        if _USAGE.search(event):
            self._usage = event

    def usage(self) -> dict[str, Any] | None:
        """The server's count of tokens, None if it sent none."""
        try:
            usage = json.loads(self._usage or b"")["usage"]
            known = {name: int(usage[name]) for name in ("prompt_tokens", "completion_tokens")}
        except (ValueError, KeyError, TypeError):
            return None
        details = usage.get("prompt_tokens_details") or {}
        return {**known, "cached_tokens": details.get("cached_tokens")}

    def timeline(self, submitted: float, tokens: int | None) -> Timeline:
        """When each of ``tokens`` came (None: one for each chunk with text).

        The last one came with the reason to finish, as tokens at the end may have no text. Where
        a server puts several tokens in a chunk, or sends nothing for some, they are spread evenly
        over its chunks, the first in the first and the last in the last: times between tokens are
        then a gap divided by the tokens in it. Of tokens that all came in one chunk only one has
        a time.
        """
        times = self.times or [self._finished or self._last]
        times = [*times[:-1], max(times[-1], self._finished)]
        chunks = len(times)
        if tokens is not None and tokens != chunks > 1:
            places = np.linspace(0, chunks - 1, max(tokens, 1))
            times = np.interp(places, np.arange(chunks), times).tolist()
        return Timeline(submitted, times)


@dataclass(slots=True, kw_only=True)
class Exchange:
    """A request and what became of it. Times are seconds of ``time.perf_counter``.

    ``due`` is when it should be sent, ``ready`` when the client came to it, ``sent`` when it was,
    ``ended`` when the answer had come or failed; ``failure`` is the kind of that, ``message`` the
    server's words.
    """

    work: Work
    due: float
    ready: float = 0.0
    sent: float = 0.0
    ended: float = 0.0
    transcript: Transcript = field(default_factory=Transcript)
    failure: str | None = None
    message: str = ""

    def fail(self, kind: str, message: str) -> None:
        """Say what went wrong."""
        self.failure, self.message = kind, message


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One pass of requests; ``start`` is when the first was due."""

    start: float
    exchanges: list[Exchange]

    def row(self, slo: Slo | None = None) -> Row:
        """Counts, rates per second, latencies in milliseconds."""
        good = [each for each in self.exchanges if each.failure is None]
        failures = Counter(each.failure for each in self.exchanges if each.failure)
        usages = [each.transcript.usage() for each in good]
        counts = _tokens(good, usages)
        lines = [
            each.transcript.timeline(each.due, usage["completion_tokens"] if usage else None)
            for each, usage in zip(good, usages, strict=True)
        ]
        duration = max(each.ended for each in self.exchanges) - self.start
        met = None if slo is None else sum(slo.met_by(line) for line in lines)
        inputs, outputs = counts["total_input_tokens"], counts["total_output_tokens"]
        figures = {
            "duration_s": duration,
            "request_throughput": len(good) / duration,
            "input_throughput": inputs / duration,
            "output_throughput": outputs / duration,
            "total_throughput": (inputs + outputs) / duration,
            "goodput": None if met is None else met / duration,
            "slo_attainment": None if met is None else met / len(self.exchanges),
            **latencies(lines),
            **_concurrency(self.exchanges, duration),
            "max_lag_ms": 1e3 * max(each.ready - each.due for each in self.exchanges),
        }
        return {
            "offered_rate": self._offered_rate(),
            "completed": len(good),
            "failed": len(self.exchanges) - len(good),
            "failures": dict(failures),
            "first_error": next((each.message for each in self.exchanges if each.failure), None),
            **counts,
            **{name: None if x is None else significant(x) for name, x in figures.items()},
        }

    def _offered_rate(self) -> float | None:
        """Requests per second that were due; None if all were at once."""
        span = self.exchanges[-1].due - self.exchanges[0].due
        return significant((len(self.exchanges) - 1) / span) if span else None


def _tokens(good: Sequence[Exchange], usages: Sequence[dict[str, Any] | None]) -> Row:
    """Tokens as the server counts them, or without that as they were sent and by chunks."""
    inputs = outputs = short = 0
    cached: list[int] = []
    for each, usage in zip(good, usages, strict=True):
        chunks = len(each.transcript.times)
        output = usage["completion_tokens"] if usage else chunks
        inputs += usage["prompt_tokens"] if usage else len(each.work.prompt)
        outputs += output
        short += output < each.work.output_len
        if usage and usage["cached_tokens"] is not None:
            cached.append(usage["cached_tokens"])
    return {
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "cached_tokens": sum(cached) if cached else None,
        "short_outputs": short,
        "without_usage": sum(usage is None for usage in usages),
    }


def _concurrency(exchanges: Sequence[Exchange], duration: float) -> Row:
    """Requests with the server, over time and at most."""
    steps = [(each.sent, 1) for each in exchanges] + [(each.ended, -1) for each in exchanges]
    return {
        "mean_concurrency": sum(each.ended - each.sent for each in exchanges) / duration,
        "max_concurrency": max(accumulate(step for _, step in sorted(steps))),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests and when each is due, in seconds since the first."""

    work: Sequence[Work]
    times: Sequence[float]


async def find_model(server: Server, wanted: str | None) -> Server:
    """The server with the name of a model: ``wanted``, or the first that it lists.

    Raises:
        KvantError: it does not answer, has no such list or nothing in it.
    """
    if wanted is not None:
        return replace(server, model=wanted)
    patient = replace(server, timeout=min(server.timeout, _PATIENCE))
    try:
        async with patient.session() as session, session.get(f"{server.url}/v1/models") as answer:
            body = await answer.read()
    except (aiohttp.ClientError, OSError) as error:
        raise KvantError(unreachable(server.url, error)) from None
    if answer.status != 200:
        text = error_text(answer.status, body, answer.headers.get("Retry-After"))
        raise KvantError(f"{server.url}/v1/models: {text}")
    try:
        name = json.loads(body)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        raise KvantError(f"{server.url}/v1/models lists no model; give the name of one") from None
    return replace(server, model=str(name))


async def measure(
    server: Server,
    loads: Sequence[Load],
    codec: Codec,
    *,
    slo: Slo | None = None,
    max_concurrency: int | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """A short request to warm up, then one load after the other; a row for each. ``tick`` is told
    of requests that ended.

    Raises:
        KvantError: the first request failed.
    """
    prompt, output_len = loads[0].work[0]
    warm = Load(work=[Work(prompt[:_WARM_PROMPT], min(output_len, _WARM_OUTPUT))], times=[0.0])
    (first,) = (await open_loop(server, warm, codec)).exchanges
    if first.failure is not None:
        raise KvantError(f"{server.endpoint} fails ({first.failure}): {first.message}")
    return [
        (await open_loop(server, load, codec, max_concurrency, tick)).row(slo) for load in loads
    ]


async def open_loop(
    server: Server,
    load: Load,
    codec: Codec,
    max_concurrency: int | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Run:
    """Send each request when it is due, or if ``max_concurrency`` are running, when one of them
    has ended."""
    bodies = [server.body(work, codec) for work in load.work]
    slots: AbstractAsyncContextManager[Any] = (
        nullcontext() if max_concurrency is None else asyncio.Semaphore(max_concurrency)
    )
    async with server.session() as session, asyncio.TaskGroup() as running:
        start = time.perf_counter()
        exchanges = [
            Exchange(work=work, due=start + due)
            for work, due in zip(load.work, load.times, strict=True)
        ]

        async def answer(exchange: Exchange, body: bytes) -> None:
            exchange.ready = time.perf_counter()
            async with slots:
                await _converse(session, server.endpoint, exchange, body)
            tick(1)

        for exchange, body in zip(exchanges, bodies, strict=True):
            if (delay := exchange.due - time.perf_counter()) > 0:
                await asyncio.sleep(delay)
            running.create_task(answer(exchange, body))
    return Run(start=start, exchanges=exchanges)


async def _converse(
    session: aiohttp.ClientSession, endpoint: str, exchange: Exchange, body: bytes
) -> None:
    """Send a request and read its answer to the end; what fails is noted."""
    transcript, began = exchange.transcript, False
    exchange.sent = time.perf_counter()
    try:
        async with session.post(endpoint, data=body) as response:
            if response.status != 200:
                text, wait = await response.read(), response.headers.get("Retry-After")
                exchange.fail(f"http_{response.status}", error_text(response.status, text, wait))
                return
            began = True
            async for data in response.content.iter_any():
                transcript.feed(data, time.perf_counter())
        if transcript.error is not None:
            exchange.fail("broken_stream", message_of(transcript.error))
        elif not transcript.done:
            exchange.fail("broken_stream", "the stream ended without [DONE]")
    except TimeoutError:
        exchange.fail("timeout", f"no end after {session.timeout.total:g} s")
    except (aiohttp.ClientError, OSError) as error:
        exchange.fail("broken_stream" if began else "connection", reason(error))
    finally:
        exchange.ended = time.perf_counter()
