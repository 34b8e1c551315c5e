"""What a longer context costs a decode step of a whole model, with random weights and caches that
are filled without a prefill.

    python benchmarks/gpu/growth.py [--budget SECONDS] [--output ROWS.json]

break even  Tokens per second with as many sequences of a context (at most 256) as 0.8 of the free
            memory holds: where a format's capacity and speed begin to pay.
step        Milliseconds of a step of the decoder, from its batch to the token ids on the host, for
            a token of each of some sequences; the median of several.
slope       Least squares of these over the contexts that the first format has, too;
            ``times_16bit``: against its slope over the same ones.
weights     The same steps with weights of 16 and of 4 bits, over a 16-bit cache.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from attention import dtype_name, specs
from clock import Deadline
from models import start
from pages import Tables, fill
from report import Row, Rows, options, run
from shapes import open_random

from kvant.bench.metrics import significant
from kvant.config import EngineConfig
from kvant.engine.load import OpenModel
from kvant.formats import PAGE_TOKENS, KVSpec
from kvant.models.decoder import DecoderWeights

SLOPES = {"int8": 0.54, "int4": 0.33, "int4h": 0.33, "k4v4": 0.33}
"""By format: the most that its slope may be of the 16-bit one."""
MOST = 256
"""Sequences of a step."""
EVEN_SHARE, SLOPE_SHARE = 0.45, 0.8
"""Of the time that is left, that of break-even and that of slopes."""

Line = dict[int, float]
"""Seconds of a step by context."""


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
    model="smoke", models=("smoke",), batches=(1,), contexts=(64, 128, 192), even=(256,), steps=1,
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
        gc.collect()  # a cache that is gone keeps no pages
        spec = KVSpec.parse(kv)
        config = EngineConfig(
            backend="triton",
            dtype=dtype_name(),
            kv=spec,
            kv_tokens=kv_tokens,
            max_batch_size=sequences,
        )
        self._model = start(opened, weights, config)
        memory = self._model.memory
        fill(self._model.backend, memory, weights.embedding.dtype)
        base, recent = memory.base.num_pages, memory.recent.num_pages
        self.tokens = base * PAGE_TOKENS
        self._tables = Tables(spec, base, recent)

    def seconds(self, batch: int, context: int, count: int) -> float:
        """The median step."""
        step = self._tables.decodes(batch, context)
        times = []
        for index in range(count + 1):
            begin = time.perf_counter()
            logits = self._model.decoder.forward(step, self._model.backend)
            logits.choose(list(range(batch)), [None] * batch)
            if index:  # the first one compiles and captures
                times.append(time.perf_counter() - begin)
        return statistics.median(times)


def growth(sizes: Sizes, rows: Rows, deadline: Deadline) -> None:
    """Steps and slopes of all formats."""
    opened = open_random(sizes.model)
    weights = opened.weights(EngineConfig(backend="triton", dtype=dtype_name()))
    first: dict[int, Line] = {}
    kvs = specs()
    for index, kv in enumerate(kvs):
        if deadline.passed(10):
            rows.add({"what": "deadline", "note": f"slopes end before {kv}"})
            break
        own = Deadline(deadline.left / (len(kvs) - index))

        def one(kv: str = kv, own: Deadline = own) -> Iterator[Row]:
            steps = Steps(opened, weights, kv, max(sizes.batches), sizes.kv_tokens)
            for batch in sizes.batches:
                line: Line = {}
                for context in sizes.contexts:
                    if batch * context > steps.tokens or own.passed():
                        break
                    line[context] = took = steps.seconds(batch, context, sizes.steps)
                    ms = significant(1e3 * took)
                    yield {"what": "step", "batch": batch, "context": context, "ms": ms}
                yield from slope_rows(kv, batch, line, first.setdefault(batch, line))

        rows.attempt({"model": sizes.model, "kv": kv}, one)


def slope_rows(kv: str, batch: int, line: Line, first: Line) -> list[Row]:
    """The slope over the contexts that ``first``, the line of the first format, has, too."""
    contexts = [context for context in line if context in first]
    if len(contexts) < 3:
        return []
    (slope, offset), (beside, _) = (
        np.polyfit(contexts, [each[context] for context in contexts], 1) for each in (line, first)
    )
    against = float(slope / beside)
    row: Row = {
        "what": "slope",
        "batch": batch,
        "contexts": contexts,
        "ms_per_1k_tokens": significant(1e3 * 1024 * float(slope)),
        "ms_at_0": significant(1e3 * float(offset)),
        "times_16bit": significant(against),
    }
    return [row | ({"meets_target": against <= SLOPES[kv]} if kv in SLOPES else {})]


def break_even(sizes: Sizes, rows: Rows, deadline: Deadline) -> None:
    """Tokens per second of all formats at each context, as many sequences as fit."""
    for index, model in enumerate(sizes.models):
        own = Deadline(deadline.left / (len(sizes.models) - index))
        opened = open_random(model)
        weights = opened.weights(EngineConfig(backend="triton", dtype=dtype_name()))
        first: dict[int, float] = {}
        for kv in specs():
            if own.passed(5):
                rows.add({"what": "deadline", "note": f"break even of {model} ends before {kv}"})
                break

            def one(kv: str = kv, opened: OpenModel = opened, w: DecoderWeights = weights,
                    first: dict[int, float] = first) -> Iterator[Row]:  # fmt: skip
                steps = Steps(opened, w, kv, MOST, sizes.kv_tokens)
                for context in sizes.even:
                    batch = min(MOST, steps.tokens // context)
                    if not batch:
                        continue
                    rate = batch / steps.seconds(batch, context, sizes.steps)
                    against = rate / first.setdefault(context, rate)
                    yield {
                        "context": context,
                        "batch": batch,
                        "output_throughput": significant(rate),
                        "times_16bit": significant(against),
                    }

            rows.attempt({"what": "break even", "model": model, "kv": kv}, one)
        del weights
        gc.collect()


def weights_of_4_bits(sizes: Sizes, rows: Rows, deadline: Deadline) -> None:
    """Steps with each type of weights."""
    context, first = sizes.contexts[0], dict[int, float]()
    for weight_dtype in ("auto", "int4"):
        if deadline.passed(5):
            rows.add({"what": "deadline", "note": f"ends before {weight_dtype} weights"})
            break

        def one(weight_dtype: str = weight_dtype) -> Iterator[Row]:
            opened = open_random(sizes.model)
            weights = opened.weights(
                EngineConfig(backend="triton", dtype=dtype_name(), weight_dtype=weight_dtype)
            )
            tokens = max(sizes.batches) * (context + PAGE_TOKENS)
            steps = Steps(opened, weights, specs()[0], max(sizes.batches), tokens)
            for batch in sizes.batches:
                took = steps.seconds(batch, context, sizes.steps)
                against = took / first.setdefault(batch, took)
                yield {
                    "batch": batch,
                    "context": context,
                    "ms": significant(1e3 * took),
                    "times_16bit": significant(against),
                }

        rows.attempt({"what": "weights", "model": sizes.model, "weight_dtype": weight_dtype}, one)
        gc.collect()


def program(args: argparse.Namespace, rows: Rows, deadline: Deadline) -> None:
    sizes = SMOKE if args.smoke else Sizes()
    break_even(sizes, rows, Deadline(EVEN_SHARE * deadline.left))
    growth(sizes, rows, Deadline(SLOPE_SHARE * deadline.left))
    weights_of_4_bits(sizes, rows, deadline)


if __name__ == "__main__":
    sys.exit(run(program, options(__doc__).parse_args()))
