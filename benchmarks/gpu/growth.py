"""What a longer context costs a decode step of a whole model, with random weights and caches that
are filled without a prefill.

    python benchmarks/gpu/growth.py [--budget SECONDS] [--output ROWS.json]

step        Milliseconds of a step of the decoder, from its batch to the token ids on the host, for
            a token of each of some sequences; the median of several.
slope       Least squares of these over the context; ``times_16bit``: against the first format.
break even  Tokens per second with as many sequences of a context (at most 256) as 0.8 of the free
            memory holds: where a format's capacity and speed begin to pay.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from attention import dtype_of, specs
from clock import Deadline
from pages import Tables, fill
from report import Row, Rows, options, run
from shapes import open_random

from kvant.bench.metrics import significant
from kvant.config import EngineConfig
from kvant.engine.load import OpenModel, start_model
from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.models.decoder import DecoderWeights

SLOPES = {"int8": 0.54, "int4": 0.33, "int4h": 0.33, "k4v4": 0.33}
"""By format: the most that its slope may be of the 16-bit one."""
MOST = 256
"""Sequences of a step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What is measured."""

    model: str = "llama-3-8b"
    models: tuple[str, ...] = ("llama-3-8b", "qwen2.5-7b")
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = tuple(2**power * 1024 for power in range(8))
    even: tuple[int, ...] = (1024, 8192, 32256)
    steps: int = 12
    kv_tokens: int | None = None


SMOKE = Sizes(
    model="smoke", models=("smoke",), batches=(2,), contexts=(128, 192, 256), even=(128,), steps=1,
    kv_tokens=512,
)  # fmt: skip


class Steps:
    """A model with a full cache of one format.

    Args:
        opened, weights: the model.
        kv: the format.
        sequences: the most that a step has.
        kv_tokens: of the cache; None: what 0.8 of the free memory holds.
    """

    def __init__(
        self,
        opened: OpenModel,
        weights: DecoderWeights,
        kv: str,
        sequences: int,
        kv_tokens: int | None,
    ) -> None:
        spec = KVSpec.parse(kv)
        config = EngineConfig(
            backend="triton", kv=spec, kv_tokens=kv_tokens, max_batch_size=sequences
        )
        engine = start_model(opened, weights, config).engine
        self._memory, self._backend = engine.memory, engine.backend
        self._model: Any = engine._model  # the loop around it is the scheduler's
        fill(self._backend, self._memory, dtype_of(specs()[0]))
        base, recent = self._memory.base.num_pages, self._memory.recent.num_pages
        self.tokens = base * PAGE_TOKENS
        self._tables = Tables(spec, base, recent)

    def seconds(self, batch: int, context: int, count: int) -> float:
        """The median step."""
        step = self._tables.decodes(batch, context)
        times = []
        for index in range(count + 1):
            start = time.perf_counter()
            logits = self._model.forward(step, self._backend)
            logits.choose(list(range(batch)), [None] * batch)
            if index:  # the first one compiles and captures
                times.append(time.perf_counter() - start)
        return statistics.median(times)


def growth(sizes: Sizes, rows: Rows, deadline: Deadline) -> None:
    """Steps and slopes of all formats."""
    opened = open_random(sizes.model)
    weights = opened.weights(EngineConfig(backend="triton"))
    first: dict[int, float] = {}
    for kv in specs():
        case: Row = {"model": sizes.model, "kv": kv}
        if deadline.passed(10):
            rows.add({"what": "deadline", "note": f"growth ends before {kv}"})
            break

        def one(kv: str = kv) -> list[Row]:
            points: dict[int, list[tuple[int, float]]] = {batch: [] for batch in sizes.batches}
            steps = Steps(opened, weights, kv, max(sizes.batches), sizes.kv_tokens)
            for batch in sizes.batches:
                for context in sizes.contexts:
                    if batch * context > steps.tokens or deadline.passed():
                        break
                    points[batch].append((context, steps.seconds(batch, context, sizes.steps)))
            return step_rows(points) + slope_rows(kv, points, first)

        rows.attempt(case, one)
        gc.collect()


def step_rows(points: dict[int, list[tuple[int, float]]]) -> list[Row]:
    return [
        {"what": "step", "batch": batch, "context": context, "ms": significant(1e3 * took)}
        for batch, line in points.items()
        for context, took in line
    ]


def slope_rows(
    kv: str, points: dict[int, list[tuple[int, float]]], first: dict[int, float]
) -> list[Row]:
    """Slopes over contexts, against those of the first format, which ``first`` keeps."""
    found: list[Row] = []
    for batch, line in points.items():
        if len(line) < 3:
            continue
        slope, offset = np.polyfit(*np.array(line).T, 1)
        against = float(slope / first.setdefault(batch, slope))
        row: Row = {
            "what": "slope",
            "batch": batch,
            "points": len(line),
            "longest": line[-1][0],
            "ms_per_1k_tokens": significant(1e3 * 1024 * float(slope)),
            "ms_at_0": significant(1e3 * float(offset)),
            "times_16bit": significant(against),
        }
        if kv in SLOPES:
            row["meets_target"] = against <= SLOPES[kv]
        found.append(row)
    return found


def break_even(sizes: Sizes, rows: Rows, deadline: Deadline) -> None:
    """Tokens per second of all formats at each context, as many sequences as fit."""
    for model in sizes.models:
        opened = open_random(model)
        if deadline.passed(15):
            rows.add({"what": "deadline", "note": f"break even ends before {model}"})
            break
        weights = opened.weights(EngineConfig(backend="triton"))
        first: dict[int, float] = {}
        for kv in specs():
            if deadline.passed(5):
                break

            def one(kv: str = kv, opened: OpenModel = opened, w: DecoderWeights = weights,
                    first: dict[int, float] = first) -> list[Row]:  # fmt: skip
                steps = Steps(opened, w, kv, MOST, sizes.kv_tokens)
                found = []
                for context in sizes.even:
                    batch = min(MOST, steps.tokens // context)
                    if not batch:
                        continue
                    rate = batch / steps.seconds(batch, context, sizes.steps)
                    against = rate / first.setdefault(context, rate)
                    found.append(
                        {
                            "context": context,
                            "batch": batch,
                            "output_throughput": significant(rate),
                            "times_16bit": significant(against),
                        }
                    )
                return found

            rows.attempt({"what": "break even", "model": model, "kv": kv}, one)
            gc.collect()
        del weights
        gc.collect()


def program(args: argparse.Namespace, rows: Rows, deadline: Deadline) -> None:
    sizes = SMOKE if args.smoke else Sizes()
    growth(sizes, rows, deadline)
    break_even(sizes, rows, deadline)


if __name__ == "__main__":
    sys.exit(run(program, options(__doc__).parse_args()))
