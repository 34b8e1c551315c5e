"""Measure static batches: requests of one length, all sent at once.

Each combination of --concurrency, --prompt-tokens and --completion-tokens is run with each KV
format of --kv, in turns.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvant.bench.metrics import check_counts
from kvant.bench.plot import plot_latency
from kvant.cli import bench as shared
from kvant.cli import measuring
from kvant.cli.terminal import table

if TYPE_CHECKING:
    from kvant.bench.throughput import Row

__all__ = ["configure", "run"]

_AXES = {
    "concurrency": ("1,16", "numbers of requests"),
    "prompt_tokens": ("256,1024", "tokens of each prompt"),
    "completion_tokens": ("128", "tokens to generate"),
}
_COLUMNS = {
    "concurrency": "batch",
    "prompt_tokens": "prompt",
    "completion_tokens": "output",
    "output_throughput": "output tokens/s",
    "prefill_throughput": "prefill tokens/s",
    "decode_throughput": "decode tokens/s",
    "median_ttft_ms": "TTFT, ms",
    "median_itl_ms": "ITL, ms",
    "p99_itl_ms": "p99",
    "speed_of_first": "speed",
}


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant bench latency``."""
    for name, (default, about) in _AXES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="N,...",
            default=default,
            help=f"{about} (default: {default})",
        )
    shared.add_engine(parser, repeats=3)


def run(options: Namespace) -> int:
    """Measure, print and store."""
    config, specs = shared.read_engine(options)
    axes = {name: shared.integers(name, getattr(options, name)) for name in _AXES}
    check_counts(**axes)
    measuring.check_targets(options)
    opened = measuring.find_model(options, config)
    from kvant.bench.latency import cases, measure
    from kvant.bench.throughput import Bench, check_fit, num_tokens
    from kvant.bench.workload import Vocabulary

    grid = cases(*axes.values())
    vocabulary = Vocabulary(opened.tokenizer, opened.config.vocab_size)
    work = {case: case.work(vocabulary, options.seed) for case in grid}
    for spec in specs:
        for case in grid:
            check_fit(opened, config, spec, work[case], case.batch)
    weights = measuring.load_weights(options, config, opened)
    total = options.repeats * len(specs) * sum(num_tokens(each) for each in work.values())
    with measuring.ticking("measuring", total, shown=not options.json) as tick:
        bench = Bench(opened=opened, weights=weights, config=config, tick=tick)
        rows = measure(bench, specs, work, options.repeats)
    shared.finish(
        options,
        rows,
        text=_text,
        plot=plot_latency,
        model=options.model,
        dtype=config.dtype,
        workload={"repeats": options.repeats, "seed": options.seed},
    )
    return 0


def _text(rows: Sequence[Row]) -> str:
    lines = [[row["kv"], *(shared.text_of(row[key]) for key in _COLUMNS)] for row in rows]
    about = f"{rows[0]['weight_dtype']} weights; speed: {rows[0]['kv']} = 1; TTFT and ITL: medians"
    return f"{about}\n\n{table(['KV format', *_COLUMNS.values()], lines)}"
