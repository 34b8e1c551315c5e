"""What Prometheus is told. ``docs/metrics.md`` lists every name beside LMDeploy's and vLLM's.

What happens to requests is counted as it happens; what the engine knows is read when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from kvant import __version__
from kvant.engine.engine import EngineStats
from kvant.request import FinishReason

__all__ = ["PREFIX", "CacheFacts", "Finished", "Metrics"]

PREFIX = "kvant:"

_STATES = ("starting", "ready", "draining", "failed")
_REJECTIONS = ("queue_full", "draining", "too_large", "unauthorized", "invalid")
_OPENMETRICS = "application/openmetrics-text"

_BETWEEN_TOKENS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10),
)
_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600, 1200, 1800, 3600),
)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_RATIOS = tuple(tenth / 10 for tenth in range(11))
_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128)
_CLIENT_GONE = 499  # as nginx has it
_TIMES_AGAIN = (0, 1, 2, 5, 10)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheFacts:
    """What is settled about the KV cache once a model is loaded.

    ``kv_format`` is for people ("K int8, V int4"). Bytes of a token are of all layers; a page has
    ``page_tokens``, the pool ``pool_bytes``. At most ``max_running`` sequences run at a time, of at
    most ``session_len`` tokens.
    """

    kv_format: str
    bytes_per_token: float
    bytes_per_token_16bit: float
    page_tokens: int
    pool_bytes: int
    max_running: int
    session_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A sequence at its end. Times are seconds: ``queue_s`` to its first step, ``prefill_s`` from
    there to its first token, ``decode_s`` from there to its end, ``e2e_s`` all of it; None for what
    it never came to. ``max_tokens`` and ``n`` are what its request asked for."""

    reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    queue_s: float | None
    prefill_s: float | None
    decode_s: float | None
    e2e_s: float
    preemptions: int
    max_tokens: int | None
    n: int


class Metrics:
    """All series of a server, in a registry of their own. Usable from any thread.

    Args:
        model_name: a label of every series but those of the process.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._engine = _EngineCollector(model_name)
        self.registry.register(self._engine)
        ProcessCollector(registry=self.registry)
        self._make_http()
        self._make_requests()
        self._make_times()

    def _make_http(self) -> None:
        self._http = self._counter(
            "http_requests_total",
            "HTTP requests; status is 2xx, 4xx, 5xx, or gone: the client left before an answer",
            "route",
            "status",
        )
        self._http_seconds = self._histogram(
            "http_request_duration_seconds",
            "HTTP requests, to the last byte of the answer",
            _SECONDS,
            "route",
        )
        self._rejected = self._counter(
            "requests_rejected_total", "requests turned away before the engine saw them", "reason"
        )
        for reason in _REJECTIONS:
            self._rejected.labels(self._model_name, reason)

    def _make_requests(self) -> None:
        counter, histogram = self._counter, self._histogram
        self._ended = counter(
            "request_success_total",
            "sequences that ended: stop, length, error or abort",
            "finished_reason",
        )
        for reason in get_args(FinishReason):
            self._ended.labels(self._model_name, reason)
        self._aborted = counter(
            "requests_aborted_total", "sequences cut because the client left or the server drained"
        )
        self._queries = counter(
            "prefix_cache_queries_total", "prompt tokens of ended sequences that had been started"
        )
        self._hits = counter("prefix_cache_hits_total", "those of them found in the cache")
        self._prompt_tokens = histogram("request_prompt_tokens", "length of the prompt", _TOKENS)
        self._cached_tokens = histogram(
            "request_cached_tokens", "what of the prompt was found in the cache", _TOKENS
        )
        self._hit_ratio = histogram(
            "request_cache_hit_ratio", "the same as a share of the prompt, 0 to 1", _RATIOS
        )
        self._generated = histogram("request_generation_tokens", "length of the answer", _TOKENS)
        self._max_tokens = histogram(
            "request_params_max_tokens", "longest answer that the request allows", _TOKENS
        )
        self._n = histogram("request_params_n", "n of the sequence's request", _SEQUENCES)
        self._preemptions = histogram(
            "request_preemptions", "how often the sequence gave its pages up", _TIMES_AGAIN
        )

    def _make_times(self) -> None:
        histogram = self._histogram
        self._first_token = histogram(
            "time_to_first_token_seconds", "arrival of the request to the first token", _SECONDS
        )
        self._between = histogram(
            "inter_token_latency_seconds", "from one token to the next, for each", _BETWEEN_TOKENS
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds",
            "a sequence's mean time for a token after the first",
            _BETWEEN_TOKENS,
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "arrival of the request to the end", _SECONDS
        )
        self._queue = histogram(
            "request_queue_time_seconds", "waiting for the first step", _SECONDS
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "first step to first token", _SECONDS
        )
        self._decode = histogram("request_decode_time_seconds", "first token to the end", _SECONDS)
        self._inference = histogram(
            "request_inference_time_seconds", "first step to the end", _SECONDS
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        names = ("model_name", *labels)
        counter = Counter(PREFIX + name, text, names, registry=self.registry)
        return counter if labels else counter.labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        names = ("model_name", *labels)
        histogram = Histogram(PREFIX + name, text, names, buckets=buckets, registry=self.registry)
        return histogram if labels else histogram.labels(self._model_name)

    def watch_state(self, state: Callable[[], str]) -> None:
        """Read the server's state from ``state``: starting, ready, draining or failed."""
        self._engine.state = state

    def attach(
        self,
        facts: CacheFacts,
        stats: Callable[[], EngineStats],
        heartbeat_age: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Report on an engine from now on. Both functions are called whenever somebody asks and
        must not wait; ``heartbeat_age`` is in seconds, 0 if the engine would answer at once."""
        self._engine.sources = _Sources(facts, stats, heartbeat_age)

    def http(self, route: str, status: int, seconds: float) -> None:
        """Count an HTTP request. ``route`` is a template, never a path as sent; status 0 means that
        the client left before the answer began."""
        kind = "gone" if status in (0, _CLIENT_GONE) else f"{status // 100}xx"
        self._http.labels(self._model_name, route, kind).inc()
        self._http_seconds.labels(self._model_name, route).observe(seconds)

    def rejected(self, reason: str) -> None:
        """Count a request that was turned away: queue_full, draining, too_large, unauthorized or
        invalid."""
        self._rejected.labels(self._model_name, reason).inc()

    def first_token(self, seconds: float) -> None:
        """Count a sequence's first token, so many seconds after its request came."""
        self._first_token.observe(seconds)

    def tokens_came(self, seconds: float, count: int) -> None:
        """Count ``count`` tokens that came together, ``seconds`` after the one before."""
        for _ in range(count):
            self._between.observe(seconds / count)

    def finished(self, done: Finished) -> None:
        """Count a sequence at its end, however it ended."""
        self._ended.labels(self._model_name, done.reason).inc()
        if done.reason == "abort":
            self._aborted.inc()
        if done.queue_s is not None:
            self._count_prefix(done)
        self._prompt_tokens.observe(done.prompt_tokens)
        self._generated.observe(done.generated_tokens)
        if done.max_tokens is not None:
            self._max_tokens.observe(done.max_tokens)
        self._n.observe(done.n)
        self._preemptions.observe(done.preemptions)
        self._count_times(done)

    def _count_prefix(self, done: Finished) -> None:
        self._queries.inc(done.prompt_tokens)
        self._hits.inc(done.cached_tokens)
        self._cached_tokens.observe(done.cached_tokens)
        self._hit_ratio.observe(done.cached_tokens / max(1, done.prompt_tokens))

    def _count_times(self, done: Finished) -> None:
        inference = per_token = None
        if done.prefill_s is not None and done.decode_s is not None:
            inference = done.prefill_s + done.decode_s
        if done.decode_s is not None and done.generated_tokens > 1:
            per_token = done.decode_s / (done.generated_tokens - 1)
        for histogram, seconds in (
            (self._queue, done.queue_s),
            (self._prefill, done.prefill_s),
            (self._decode, done.decode_s),
            (self._inference, inference),
            (self._per_token, per_token),
            (self._e2e, done.e2e_s),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def render(self, accept: str | None = None) -> tuple[bytes, str]:
        """All series and their content type: OpenMetrics if ``accept`` (the request's header) has
        it, else Prometheus' text."""
        # Without escaping=allow-utf-8 prometheus-client turns the colon in names of OpenMetrics
        # samples into "_": they would differ from those of the text.
        wanted = f"{_OPENMETRICS}; version=1.0.0; escaping=allow-utf-8"
        encode, content_type = choose_encoder(wanted if _OPENMETRICS in (accept or "") else "")
        return encode(self.registry), content_type


@dataclass(frozen=True, slots=True)
class _Sources:
    facts: CacheFacts
    stats: Callable[[], EngineStats]
    heartbeat_age: Callable[[], float]


class _EngineCollector(Collector):
    """Asks the server for its state and the engine for its numbers, at every scrape."""

    def __init__(self, model_name: str) -> None:
        self.state: Callable[[], str] = lambda: "starting"
        self.sources: _Sources | None = None
        self._model_name = model_name

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        state, sources = self.state(), self.sources
        yield self._info("build_info", "the version of kvant", {"version": __version__})
        states = {each: float(each == state) for each in _STATES}
        yield self._by("server_state", "1 for the state that the server is in", "state", states)
        up = sources is not None and state != "failed"
        yield self._gauge("engine_up", "1 if a model is loaded and its engine has not failed", up)
        if sources is not None:
            yield self._gauge(
                "engine_heartbeat_age_seconds",
                "how long the engine has not listened: what its step has taken so far",
                sources.heartbeat_age(),
            )
            stats = sources.stats()
            yield from self._settled(sources.facts)
            yield from self._pages(sources.facts, stats)
            yield from self._totals(stats)

    def _settled(self, facts: CacheFacts) -> Iterator[Metric]:
        yield self._info("kv_format_info", "the KV cache's format", {"kv_format": facts.kv_format})
        for name, text, value in (
            ("kv_bytes_per_token", "keys and values of a token, all layers", facts.bytes_per_token),
            ("kv_bytes_per_token_16bit", "the same in 16 bits", facts.bytes_per_token_16bit),
            ("kv_page_tokens", "tokens that a page holds", facts.page_tokens),
            ("kv_pool_bytes", "memory of the KV cache", facts.pool_bytes),
            ("max_requests_running", "most sequences that run at a time", facts.max_running),
            ("session_len_tokens", "longest sequence, prompt and answer", facts.session_len),
        ):
            yield self._gauge(name, text, value)

    def _pages(self, facts: CacheFacts, stats: EngineStats) -> Iterator[Metric]:
        held, cached, total = stats.pages_held, stats.pages_cached, stats.pages_total
        free = max(0, total - held - cached)  # the engine goes on while it is read
        states = {"held": held, "cached": cached, "free": free}
        yield self._by(
            "kv_pages",
            "pages held by sequences; cached for later prompts, given away when needed; free",
            "state",
            states,
        )
        room = (free + cached) * facts.page_tokens
        for name, text, value in (
            ("kv_pages_total", "pages of the KV cache", total),
            ("kv_cache_usage_perc", "share of the pages that sequences hold, 0 to 1", held / total),
            ("kv_tokens_available", "tokens that still fit, in free and cached pages", room),
            ("num_requests_running", "sequences that run", stats.running),
            ("num_requests_waiting", "sequences that wait, preempted ones too", stats.waiting),
        ):
            yield self._gauge(name, text, value)

    def _totals(self, stats: EngineStats) -> Iterator[Metric]:
        prompt, cached = stats.prompt_tokens, stats.cached_tokens
        for name, text, value in (
            ("prompt_tokens_total", "prompt tokens, counted when they come", prompt),
            ("cached_tokens_total", "prompt tokens not computed, counted at the end", cached),
            ("generation_tokens_total", "tokens generated", stats.generated_tokens),
            ("num_preemptions_total", "times a sequence gave its pages up", stats.preemptions),
            ("engine_steps_total", "steps of the engine", stats.steps),
        ):
            counter = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        rate = cached / max(1, prompt)
        yield self._gauge(
            "prefix_cache_hit_rate", "cached_tokens of prompt_tokens since the start, 0 to 1", rate
        )

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _by(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name", label])
        for kind, value in values.items():
            family.add_metric([self._model_name, kind], value)
        return family

    def _info(self, name: str, text: str, facts: Mapping[str, str]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name", *facts])
        family.add_metric([self._model_name, *facts.values()], 1)
        return family
