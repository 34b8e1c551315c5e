"""What ``write`` and ``attend`` take of a model's steps: 512 tokens of prompts, and decodes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kvant.bench.attention import Plan
from kvant.bench.metrics import significant
from kvant.bench.throughput import Row, Tick
from kvant.bench.timing import seconds
from kvant.config import EngineConfig, GenerationConfig
from kvant.engine.engine import Engine
from kvant.engine.load import OpenModel, start_model
from kvant.formats import PAGE_TOKENS
from kvant.kernels import Backend
from kvant.models.decoder import DecoderWeights
from kvant.request import Request

__all__ = ["CHUNK", "measure_steps"]

CHUNK = 512
"""Rows of a step of prompts."""


class _Stopwatch:
    """A backend that times another."""

    def __init__(self, inner: Backend) -> None:
        self._inner, self.name = inner, inner.name
        self.spent = {"write": 0.0, "attend": 0.0}

    def write(self, *args: Any) -> None:
        self.spent["write"] += seconds(lambda: self._inner.write(*args))

    def attend(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        out = self._inner.attend(*args, **options)
        self.spent["attend"] += time.perf_counter() - start
        return out


def measure_steps(
    opened: OpenModel,
    weights: DecoderWeights,
    config: EngineConfig,
    plan: Plan,
    prompt: int,
    repeats: int,
    tick: Tick,
) -> list[Row]:
    """A row for prefill and decode steps of every format; medians over repeats. Decode: means over
    64 steps, in which each of the largest batch of sequences fills a page.

    Args:
        prompt: the prompts' tokens, a multiple of 512.
        tick: told about each of ``2 * repeats`` passes.
    """
    batch = max(plan.batches)
    longest = PAGE_TOKENS + 4 * batch * prompt // CHUNK  # the first decodes while others wait
    engines = {}
    for spec in plan.specs:
        own = replace(
            config,
            kv=spec,
            kv_tokens=batch * (prompt + longest + PAGE_TOKENS),
            max_batch_size=batch,
            enable_prefix_caching=False,
            max_prefill_token_num=CHUNK,
        )
        engines[spec.label] = start_model(opened, weights, own).engine
    rows: list[Row] = []
    for kind, new, wanted in (("prefill", 1, CHUNK), ("decode", longest, batch)):
        passes = []
        for _ in range(repeats):
            passes.append(_timed_steps(engines, batch, prompt, new))
            tick(1)
        for kv in engines:
            found = [[s for s in run[kv] if s["rows"] == wanted][:PAGE_TOKENS] for run in passes]
            means = [
                {name: statistics.mean(s[name] for s in run) for name in run[0]} for run in found
            ]
            row: Row = {"what": "write", "step": kind, "kv": kv, "rows": wanted, "prompt": prompt}
            for name in ("step", "write", "attend"):
                row[f"{name}_seconds"] = significant(statistics.median(m[name] for m in means))
            for name in ("write", "attend"):
                share = statistics.median(m[name] / m["step"] for m in means)
                row[f"{name}_percent"] = round(100 * share, 2)
            rows.append(row)
    return rows


def _timed_steps(
    engines: Mapping[str, Engine], batch: int, prompt: int, new: int
) -> dict[str, list[dict[str, float]]]:
    """Run the same requests in all engines, which take turns step by step."""
    rng = np.random.default_rng(0)
    for engine in engines.values():
        for index in range(batch):
            tokens = rng.integers(0, engine.vocab_size, prompt).tolist()
            engine.submit(Request(index, tokens, prompt, GenerationConfig(), prompt + new))
    found: dict[str, list[dict[str, float]]] = {kv: [] for kv in engines}
    while any(engine.has_work for engine in engines.values()):
        for kv, engine in engines.items():
            inner = engine.backend
            engine.backend = watch = _Stopwatch(inner)
            start = time.perf_counter()
            plan = engine.step()
            took = time.perf_counter() - start
            engine.backend = inner
            if plan is not None:
                rows = sum(part.end - part.start for part in plan.slices)
                found[kv].append({"rows": rows, "step": took, **watch.spent})
    return found
