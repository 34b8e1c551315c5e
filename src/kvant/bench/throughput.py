"""Requests through an engine, a fixed number of them at a time: LMDeploy's ``profile_throughput``.

The loop is closed: a request that ends is followed by the next one. The engine steps in the calling
thread; outputs are detokenized as for a user, and a token's time is when it is handed over. Output
lengths are exact: end tokens do not end a request. Prompts are token ids beforehand, so tokenizing
is not timed.

KV formats take turns, repeat by repeat, and share the model's weights; each run has an engine of
its own, which is warmed up by a few short requests.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from kvant.bench.metrics import PeakMemory, Timeline, latencies, median, significant
from kvant.bench.workload import Vocabulary, Work
from kvant.config import EngineConfig, GenerationConfig
from kvant.engine.engine import Engine
from kvant.engine.load import LoadedModel, OpenModel, cache_size, start_model
from kvant.engine.text import TextStream
from kvant.errors import ConfigError, KvantError
from kvant.formats import KVSpec
from kvant.loading.tokenizer import Tokenizer
from kvant.models.decoder import DecoderWeights
from kvant.request import Output, Request

__all__ = ["Bench", "Row", "Run", "Tick", "check_fit", "closed_loop", "num_tokens"]

Row = dict[str, Any]
"""A row of results; docs/bench.md says what each key means."""
Tick = Callable[[int], None]
"""Told the number of tokens done since the last call."""

_WARM_REQUESTS, _WARM_TOKENS = 8, 4
_RATES = ("request", "input", "output", "total")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One pass of requests through an engine. Times are seconds; ``running`` is how many requests
    held pages at a time, mean over time and most; ``kv_usage`` the largest share of the pages
    held."""

    start: float
    duration: float
    timelines: list[Timeline]
    input_tokens: int
    cached_tokens: int
    steps: int
    preemptions: int
    mean_running: float
    max_running: int
    kv_usage: float
    kv_tokens: int = 0
    peak_rss: int = 0
    peak_rss_since: str = ""

    @property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return sum(len(line.arrivals) for line in self.timelines)

    def figures(self) -> dict[str, float | None]:
        """Rates per second, latencies in milliseconds, and what the engine was busy with."""
        counts = [len(self.timelines), self.input_tokens, self.output_tokens]
        rates = {
            f"{name}_throughput": count / self.duration
            for name, count in zip(_RATES, [*counts, counts[1] + counts[2]], strict=True)
        }
        return {
            "duration_s": self.duration,
            **rates,
            **latencies(self.timelines),
            "mean_concurrency": self.mean_running,
            "max_concurrency": self.max_running,
            "kv_usage_peak": self.kv_usage,
            "num_preemptions": self.preemptions,
            "cached_tokens": self.cached_tokens,
            "num_steps": self.steps,
        }


def num_tokens(work: Sequence[Work]) -> int:
    """Tokens of prompts and outputs."""
    return sum(len(prompt) + output_len for prompt, output_len in work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Runs requests through engines of one model.

    Args:
        opened: the model.
        weights: its weights.
        config: the engines' options; the KV format and ``max_batch_size`` are the bench's.
        tick: told about progress.
    """

    opened: OpenModel
    weights: DecoderWeights
    config: EngineConfig
    tick: Tick

    def compare(
        self, specs: Sequence[KVSpec], work: Sequence[Work], concurrency: int, repeats: int
    ) -> list[list[Run]]:
        """``repeats`` runs of every format, which take turns."""
        runs: list[list[Run]] = [[] for _ in specs]
        for _ in range(repeats):
            for spec, done in zip(specs, runs, strict=True):
                done.append(self.run(spec, work, concurrency))
        return runs

    def run(self, spec: KVSpec, work: Sequence[Work], concurrency: int) -> Run:
        """One pass through a new engine.

        Raises:
            ConfigError: a request does not fit.
            KvantError: a request failed.
        """
        gc.collect()  # an engine that is gone keeps no pages
        peak = PeakMemory()
        model = start_model(
            self.opened, self.weights, _engine_config(self.config, spec, concurrency)
        )
        _check_lengths(work, model.engine.session_len, spec.label)
        self._warm_up(model, work[: min(concurrency, _WARM_REQUESTS)])
        run = closed_loop(model.engine, model.tokenizer, work, concurrency, self.tick)
        return replace(
            run,
            kv_tokens=model.cache.num_tokens,
            peak_rss=peak.nbytes(),
            peak_rss_since=peak.since,
        )

    def _warm_up(self, model: LoadedModel, work: Sequence[Work]) -> None:
        """A few tokens of as many requests, none of them known to the prefix cache afterwards."""
        ids = Vocabulary(model.tokenizer, model.config.vocab_size).ordinary()
        rng, most = np.random.default_rng(), self.config.max_prefill_token_num
        short = [
            Work(rng.choice(ids, min(len(prompt), most)).tolist(), min(length, _WARM_TOKENS))
            for prompt, length in work
        ]
        closed_loop(model.engine, model.tokenizer, short, len(short), lambda _: None)
        model.engine.clear_prefix_cache()

    def row(self, spec: KVSpec, runs: Sequence[Run], first: Sequence[Run]) -> Row:
        """The medians of a format's runs; its speed is that of ``first`` within each repeat."""
        figures = [run.figures() for run in runs]
        speeds = [one.duration / run.duration for one, run in zip(first, runs, strict=True)]
        last, shape = runs[-1], self.opened.config.kv_shape
        return {
            "kv": spec.label,
            "kv_spec": str(spec),
            "kv_bytes_per_token": spec.bytes_per_token(shape),
            "kv_tokens": last.kv_tokens,
            "weight_dtype": self._weight_dtype(),
            "completed": len(last.timelines),
            "total_input_tokens": last.input_tokens,
            "total_output_tokens": last.output_tokens,
            **{name: median(each[name] for each in figures) for name in figures[0]},
            "speed_of_first": significant(statistics.median(speeds)),
            "all_duration_s": [significant(run.duration) for run in runs],
            "peak_rss_bytes": max(run.peak_rss for run in runs),
            "peak_rss_since": last.peak_rss_since,
        }

    def _weight_dtype(self) -> str:
        asked = self.config.weight_dtype
        if asked != "auto":
            return asked
        if self.opened.checkpoint.quantized:
            return "checkpoint"
        return str(self.weights.embedding.dtype).removeprefix("torch.")


def _engine_config(config: EngineConfig, spec: KVSpec, concurrency: int) -> EngineConfig:
    return replace(config, kv=spec, quant_policy=None, max_batch_size=concurrency)


def check_fit(
    opened: OpenModel, config: EngineConfig, spec: KVSpec, work: Sequence[Work], concurrency: int
) -> None:
    """What :meth:`Bench.run` would refuse, before weights are read.

    Raises:
        ConfigError: the format does not suit the model, the cache not the memory, or a request
            not the cache.
    """
    model = opened.config
    spec.check(model.kv_shape)
    size = cache_size(_engine_config(config, spec, concurrency), spec, model)
    _check_lengths(
        work, min(config.session_len or model.max_positions, size.num_tokens), spec.label
    )


def _check_lengths(work: Sequence[Work], limit: int, kv: str) -> None:
    """Raise ConfigError if a request is longer than ``limit`` tokens."""
    longest = max(len(prompt) + output_len for prompt, output_len in work)
    if longest > limit:
        raise ConfigError(
            f"a request takes {longest} tokens of prompt and output, and with the KV format {kv} "
            f"the limit is {limit}: shorten requests, or raise session_len or the KV cache's size"
        )


class _Client:
    """Whoever receives outputs: stamps them, and counts requests that end."""

    def __init__(self) -> None:
        self.timelines: list[Timeline] = []
        self.ended = self.tokens = 0
        self.error: str | None = None

    def request(self, work: Work, tokenizer: Tokenizer) -> Request:
        """The next request, submitted now."""
        prompt, count = work
        timeline = Timeline(time.perf_counter())
        request = Request(
            id=len(self.timelines),
            tokens=list(prompt),
            num_prompt=len(prompt),
            gen=GenerationConfig(max_new_tokens=count, ignore_eos=True),
            max_tokens=len(prompt) + count,
            deliver=partial(self._deliver, timeline, len(prompt)),
            text=TextStream(tokenizer, prompt),
        )
        self.timelines.append(timeline)
        return request

    def _deliver(self, timeline: Timeline, num_prompt: int, output: Output) -> None:
        now = time.perf_counter()
        if output.token_ids:
            self.tokens += 1 if timeline.arrivals else 1 + num_prompt
            timeline.arrivals.append(now)
        if output.finish_reason is not None:
            self.ended += 1
        if output.finish_reason not in (None, "length"):
            self.error = output.error or f"a request ended with {output.finish_reason}"


def closed_loop(
    engine: Engine, tokenizer: Tokenizer, work: Sequence[Work], concurrency: int, tick: Tick
) -> Run:
    """Run requests, ``concurrency`` at a time, in the calling thread.

    Raises:
        KvantError: a request failed.
    """
    client, before = _Client(), engine.stats()
    running: list[tuple[float, int]] = []  # seconds of each step, and requests that ran in it
    usage = 0.0
    start = time.perf_counter()
    while client.ended < len(work):
        while len(client.timelines) < min(len(work), client.ended + concurrency):
            engine.submit(client.request(work[len(client.timelines)], tokenizer))
        ended, tokens, began = client.ended, client.tokens, time.perf_counter()
        engine.step()
        if client.error is not None:
            engine.abort_all()
            raise KvantError(client.error)
        now = engine.stats()
        running.append((time.perf_counter() - began, now.running + client.ended - ended))
        usage = max(usage, now.pages_held / now.pages_total)
        tick(client.tokens - tokens)
    duration, after = time.perf_counter() - start, engine.stats()
    seconds, counts = np.array(running).T
    return Run(
        start=start,
        duration=duration,
        timelines=client.timelines,
        input_tokens=sum(len(prompt) for prompt, _ in work),
        cached_tokens=after.cached_tokens - before.cached_tokens,
        steps=after.steps - before.steps,
        preemptions=after.preemptions - before.preemptions,
        mean_running=float(np.average(counts, weights=seconds)),
        max_running=int(counts.max()),
        kv_usage=usage,
    )
