"""Requests per second of the seed's table: shapes of Llama-2-7B, Llama-2-13B and InternLM2-7B with
random weights, 256 requests at a time in a closed loop (kvant.bench.throughput), lengths lognormal
with means of 247 tokens in and 233 out, outputs of exactly these lengths.

    python benchmarks/gpu/throughput.py [--budget SECONDS] [--output ROWS.json]
                                        [--models NAME ...] [--formats NAME ...]

``held_throughput`` is the rate while 256 requests are there: tokens handed over from the first
request's end until the last request was submitted, over the mean length of an output; what follows,
when the engine runs dry, is in ``request_throughput`` only. ``times_16bit`` is the held rate
against that of the first format of the same model; ``seed`` is what LMDeploy reports of it. CUDA
graphs are captured before. All formats of a model have the same requests; how many depends on the
budget, and with fewer than 3 * 256 ``meets_target`` is null. No run is repeated.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from attention import dtype_name, specs
from clock import Deadline
from models import Started, start
from pages import Tables
from report import Row, Rows, options, run
from shapes import open_random

from kvant.bench.metrics import significant
from kvant.bench.throughput import Run, closed_loop
from kvant.bench.workload import Work
from kvant.config import EngineConfig
from kvant.engine.engine import Engine
from kvant.engine.load import OpenModel
from kvant.formats import PAGE_TOKENS
from kvant.models.decoder import DecoderWeights
from kvant.models.graphs import ROWS

CONCURRENCY = 256
MEAN_IN, MEAN_OUT, SIGMA = 247, 233, 0.9
"""Tokens, and the standard deviation of the logarithm of their number, about that of ShareGPT."""
LONGEST = 2048
"""Tokens of a request."""
CHUNK = 4096
"""Rows of a step."""
LEAST, MOST = 3, 4
"""Times the concurrency, requests of a run: for a verdict, and at all."""
KEPT = (
    "duration_s", "request_throughput", "output_throughput", "total_throughput", "mean_tpot_ms",
    "mean_concurrency", "max_concurrency", "kv_usage_peak", "num_preemptions", "num_steps",
)  # fmt: skip


class Table(NamedTuple):
    """A line of the seed's table: the share of free memory, and its ratios for int8 and 4 bits."""

    model: str
    share: float
    formats: tuple[str, ...]
    int8: float
    int4: float


FORMATS = ("int8", "k4v4", "int4h", "int4")
TABLE = (
    Table("llama-2-7b", 0.8, FORMATS, 1.27, 1.39),
    Table("llama-2-13b", 0.9, FORMATS, 1.28, 1.39),
    Table("internlm2-7b", 0.8, FORMATS, 1.05, 1.07),
)
SMOKE = (Table("smoke", 0.5, ("int8",), 1.0, 1.0),)


def lengths(rng: np.random.Generator, mean: float, count: int) -> list[int]:
    """Lognormal lengths whose mean is ``mean``, none longer than half a request may be."""
    drawn = np.minimum(rng.lognormal(0, SIGMA, count), LONGEST / 2 / mean)
    scaled = np.clip(drawn * (mean / drawn.mean()), 4, LONGEST // 2)
    return np.rint(scaled).astype(int).tolist()


def requests(vocab: int, count: int, scale: float = 1.0) -> list[Work]:
    """Random prompts; the same for the same arguments."""
    rng = np.random.default_rng(0)
    inputs, outputs = (lengths(rng, mean * scale, count) for mean in (MEAN_IN, MEAN_OUT))
    return [
        Work(rng.integers(0, vocab, length).tolist(), out)
        for length, out in zip(inputs, outputs, strict=True)
    ]


def affordable(left: float, formats: int, rate: float) -> tuple[int, int]:
    """Requests of a run and how many formats beside the first there is time for, in ``left``
    seconds at ``rate`` requests a second. A verdict on one format is worth more than more
    formats."""
    runs = int(np.clip(left * rate / (LEAST * CONCURRENCY), 2, 1 + formats))
    count = int(left * rate / runs // 64 * 64)
    return int(np.clip(count, CONCURRENCY, MOST * CONCURRENCY)), runs - 1


def held_rate(done: Run, concurrency: int) -> float | None:
    """Requests per second while ``concurrency`` of them were there; None if that was never."""
    lines = done.timelines
    if len(lines) <= concurrency:
        return None
    begin, end = min(line.arrivals[-1] for line in lines), max(line.submitted for line in lines)
    tokens = sum(begin < at <= end for line in lines for at in line.arrivals)
    mean = done.output_tokens / len(lines)
    return tokens / mean / (end - begin) if end > begin else None


def row(kv: str, done: Run, first: Run, line: Table, concurrency: int) -> Row:
    """The figures of a run."""
    figures = done.figures()
    held, beside = held_rate(done, concurrency), held_rate(first, concurrency)
    found: Row = {
        "kv": kv,
        "requests": len(done.timelines),
        "kv_tokens": done.kv_tokens,
        "held_throughput": held and significant(held),
        **{name: figures[name] and significant(figures[name]) for name in KEPT},
        "times_16bit": held and beside and significant(held / beside),
    }
    seed = {"int8": line.int8}.get(kv, line.int4 if kv in line.formats else None)
    if seed is not None:
        enough = len(done.timelines) >= LEAST * concurrency
        verdict = held / beside >= seed if held and beside and enough else None
        found |= {"seed": seed, "meets_target": verdict}
    return found


def capture_steps(model: Started, concurrency: int, longest: int) -> None:
    """Capture the steps that a run will have while requests are held, the largest first, as they
    share their memory. What they write to pages is overwritten before it is read."""
    tables = Tables(model.memory.spec, model.memory.base.num_pages, model.memory.recent.num_pages)
    for pages in (longest // PAGE_TOKENS, longest // PAGE_TOKENS // 2):
        for rows in sorted(ROWS, reverse=True):
            if concurrency // 4 <= rows <= concurrency:
                batch = tables.decodes(rows, pages * PAGE_TOKENS - 1)
                logits = model.decoder.forward(batch, model.backend)
                logits.choose(list(range(rows)), [None] * rows)


def engine_of(opened: OpenModel, model: Started, config: EngineConfig) -> Engine:
    return Engine(
        model.decoder,
        model.backend,
        model.memory,
        vocab_size=opened.config.vocab_size,
        session_len=config.session_len or LONGEST,
        max_batch_size=config.max_batch_size,
        max_step_tokens=CHUNK,
        prefix_caching=False,
    )


def measured(
    opened: OpenModel, weights: DecoderWeights, config: EngineConfig, work: list[Work]
) -> tuple[Run, Row]:
    """A run, and what else is to be known of it."""
    gc.collect()  # an engine that is gone keeps no pages
    begin = time.perf_counter()
    model = start(opened, weights, config)
    most = config.max_batch_size
    capture_steps(model, most, config.session_len or LONGEST)
    tokenizer = opened.tokenizer
    short = [Work(prompt, min(out, 4)) for prompt, out in work[: min(most, 8)]]
    closed_loop(engine_of(opened, model, config), tokenizer, short, 8, lambda _: None)
    before = model.capture.count
    about = {"warmup_s": significant(time.perf_counter() - begin)}
    done = closed_loop(engine_of(opened, model, config), tokenizer, work, most, lambda _: None)
    about["captures_in_run"] = model.capture.count - before
    return replace(done, kv_tokens=model.memory.base.num_pages * PAGE_TOKENS), about


def measure(
    line: Table, formats: Sequence[str], count: int, rows: Rows, deadline: Deadline, *, smoke: bool
) -> float:
    """Some formats of a model; requests per second of the first."""
    opened = open_random(line.model)
    concurrency = 2 if smoke else CONCURRENCY
    config = EngineConfig(
        backend="triton",
        dtype=dtype_name(),
        cache_max_entry_count=line.share,
        max_prefill_token_num=CHUNK,
        max_batch_size=concurrency,
        session_len=128 if smoke else LONGEST,
        **({"kv_tokens": 512} if smoke else {}),
    )
    work = requests(opened.config.vocab_size, count, 0.01 if smoke else 1.0)
    weights = opened.weights(config)
    runs: list[Run] = []

    def one(kv: str) -> Iterator[Row]:
        done, about = measured(opened, weights, replace(config, kv=kv, quant_policy=None), work)
        runs.append(done)
        yield row(kv, done, runs[0], line, concurrency) | about

    for kv in (specs()[0], *formats):
        case: Row = {"what": "throughput", "model": line.model, "memory_share": line.share}
        if deadline.passed(runs[0].duration if runs else 0):
            rows.add({"what": "deadline", "note": f"{line.model} ends before {kv}"})
            break
        rows.attempt(case, lambda kv=kv: one(kv))
        if not runs:  # there is nothing to compare with
            break
    return len(work) / runs[0].duration if runs else 0.0


def program(args: argparse.Namespace, rows: Rows, deadline: Deadline) -> None:
    table = [line for line in TABLE if line.model in args.models]
    rate = 10.0  # requests per second, captures and all, until it is known
    for line in SMOKE if args.smoke else table:
        if deadline.passed(10):
            rows.add({"what": "deadline", "note": f"no time for {line.model}"})
            break
        asked = [kv for kv in line.formats if kv in args.formats]
        count, formats = affordable(deadline.left, len(asked), rate)
        if left := asked[formats:]:
            note = f"{line.model}: no time for {' '.join(left)}; call again with --models"
            rows.add({"what": "deadline", "note": note})
        case: Row = {"what": "throughput", "model": line.model}
        try:
            count = 5 if args.smoke else count
            found = measure(line, asked[:formats], count, rows, deadline, smoke=args.smoke)
            rate = 0.8 * found or rate
        except Exception as error:  # weights that do not fit, say
            rows.attempt(case, lambda e=error: raised(e))
        gc.collect()


def raised(error: Exception) -> list[Row]:
    raise error


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--models", nargs="+", default=[line.model for line in TABLE])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    sys.exit(run(program, parser.parse_args()))
