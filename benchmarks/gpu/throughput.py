"""Requests per second of the seed's table: shapes of Llama-2-7B, Llama-2-13B and InternLM2-7B with
random weights, 256 requests at a time in a closed loop (kvant.bench.throughput), lengths lognormal
with means of 247 tokens in and 233 out, outputs of exactly these lengths.

    python benchmarks/gpu/throughput.py [--budget SECONDS] [--output ROWS.json]

``times_16bit`` is requests/s against the first format of the same model; ``seed`` is what LMDeploy
reports of it. How many requests a run has depends on the budget: all formats of a model have the
same ones. No run is repeated.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from attention import specs
from clock import Deadline
from report import Row, Rows, options, run
from shapes import open_random

from kvant.bench.metrics import significant
from kvant.bench.throughput import Bench, Run
from kvant.bench.workload import Work
from kvant.config import EngineConfig
from kvant.formats import KVSpec

CONCURRENCY = 256
MEAN_IN, MEAN_OUT, SIGMA = 247, 233, 0.9
"""Tokens, and the standard deviation of the logarithm of their number, about that of ShareGPT."""
LONGEST = 2048
"""Tokens of a request."""
CHUNK = 4096
"""Rows of a step."""
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


TABLE = (
    Table("llama-2-7b", 0.8, ("int8", "k4v4", "int4h", "int4"), 1.27, 1.39),
    Table("llama-2-13b", 0.9, ("int8", "k4v4"), 1.28, 1.39),
    Table("internlm2-7b", 0.8, ("int8", "k4v4"), 1.05, 1.07),
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


def affordable(left: float, runs: int, rate: float) -> int:
    """Requests of a run, if ``runs`` are to end in ``left`` seconds at ``rate`` a second."""
    return int(np.clip(left / runs * rate // 64 * 64, CONCURRENCY, 4 * CONCURRENCY))


def row(kv: str, done: Run, first: Run, line: Table) -> Row:
    """The figures of a run."""
    figures = done.figures()
    ratio = first.duration / done.duration
    found: Row = {
        "kv": kv,
        "requests": len(done.timelines),
        "kv_tokens": done.kv_tokens,
        **{name: figures[name] and significant(figures[name]) for name in KEPT},
        "times_16bit": significant(ratio),
    }
    seed = {"int8": line.int8}.get(kv, line.int4 if kv in line.formats else None)
    if seed is not None:
        found |= {"seed": seed, "meets_target": ratio >= seed}
    return found


def measure(line: Table, count: int, rows: Rows, deadline: Deadline, *, smoke: bool) -> float:
    """All formats of a model; requests per second of the first."""
    opened = open_random(line.model)
    config = EngineConfig(
        backend="triton",
        cache_max_entry_count=line.share,
        max_prefill_token_num=CHUNK,
        session_len=LONGEST,
        **({"kv_tokens": 4096} if smoke else {}),
    )
    work = requests(opened.config.vocab_size, count, 0.05 if smoke else 1.0)
    bench = Bench(opened=opened, weights=opened.weights(config), config=config, tick=lambda _: None)
    runs: list[Run] = []

    def one(kv: str) -> Callable[[], list[Row]]:
        def work_off() -> list[Row]:
            runs.append(bench.run(KVSpec.parse(kv), work, 2 if smoke else CONCURRENCY))
            return [row(kv, runs[-1], runs[0], line)]

        return work_off

    for kv in (specs()[0], *line.formats):
        case: Row = {"what": "throughput", "model": line.model, "memory_share": line.share}
        if deadline.passed(runs[0].duration if runs else 0):
            rows.add({"what": "deadline", "note": f"{line.model} ends before {kv}"})
            break
        rows.attempt(case, one(kv))
        if not runs:  # there is nothing to compare with
            break
    return len(work) / runs[0].duration if runs else 0.0


def program(args: argparse.Namespace, rows: Rows, deadline: Deadline) -> None:
    table = SMOKE if args.smoke else TABLE
    rate = 12.0  # requests per second, until it is known
    for index, line in enumerate(table):
        left = sum(1 + len(each.formats) for each in table[index:])
        if deadline.passed(10):
            rows.add({"what": "deadline", "note": f"no time for {line.model}"})
            break
        count = 3 if args.smoke else affordable(deadline.left, left, rate)
        try:
            rate = measure(line, count, rows, deadline, smoke=args.smoke) or rate
        except Exception as error:  # weights that do not fit, say
            rows.attempt({"what": "throughput", "model": line.model}, lambda e=error: raised(e))
        gc.collect()


def raised(error: Exception) -> list[Row]:
    raise error


if __name__ == "__main__":
    sys.exit(run(program, options(__doc__).parse_args()))
