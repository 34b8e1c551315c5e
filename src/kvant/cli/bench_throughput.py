"""Measure requests per second: a data set through the engine, some requests at a time.

Each KV format of --kv gets the same requests, in turns; when one ends the next is sent. Output
lengths are exact (end tokens are passed over), decoding is greedy.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kvant.bench.metrics import check_counts
from kvant.bench.plot import plot_throughput
from kvant.cli import bench as shared
from kvant.cli import datasets, measuring
from kvant.cli.terminal import table

if TYPE_CHECKING:
    from kvant.bench.throughput import Row

__all__ = ["configure", "run"]


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant bench throughput``."""
    datasets.add_dataset(parser)
    about = "requests at a time (default: 16)"
    parser.add_argument("--concurrency", metavar="N", type=int, default=16, help=about)
    shared.add_engine(parser, repeats=1)


def run(options: Namespace) -> int:
    """Measure, print and store."""
    config, specs = shared.read_engine(options)
    source = datasets.find_source(options)
    check_counts(concurrency=options.concurrency)
    dataset = source.read()
    measuring.check_targets(options)
    opened = measuring.find_model(options, config)
    from kvant.bench.throughput import Bench, check_fit, num_tokens
    from kvant.bench.workload import Vocabulary

    vocabulary = Vocabulary(opened.tokenizer, opened.config.vocab_size)
    work = dataset.draw(source.count, vocabulary, options.seed)
    for spec in specs:
        check_fit(opened, config, spec, work, options.concurrency)
    weights = measuring.load_weights(options, config, opened)
    total = options.repeats * len(specs) * num_tokens(work)
    with measuring.ticking("measuring", total, shown=not options.json) as tick:
        bench = Bench(opened=opened, weights=weights, config=config, tick=tick)
        runs = bench.compare(specs, work, options.concurrency, options.repeats)
    rows = [bench.row(spec, each, runs[0]) for spec, each in zip(specs, runs, strict=True)]
    title = f"{Path(options.model).name}, {options.concurrency} at a time"
    shared.finish(
        options,
        rows,
        text=partial(_text, options),
        plot=partial(plot_throughput, title=title),
        model=options.model,
        dtype=config.dtype,
        workload={
            **source.describe(),
            "concurrency": options.concurrency,
            "repeats": options.repeats,
            "seed": options.seed,
            **source.given,
        },
    )
    return 0


def _text(options: Namespace, rows: Sequence[Row]) -> str:
    """A table with a column for each format."""
    first = rows[0]
    about = (
        f"{first['completed']} requests, {options.concurrency} at a time: "
        f"{first['total_input_tokens']} tokens in, {first['total_output_tokens']} out; "
        f"{first['weight_dtype']} weights"
    )
    if options.repeats > 1:
        about += f"; medians of {options.repeats} runs"
    lines: list[list[str]] = []

    def add(name: str, *cells: str) -> None:
        lines.append([name, *cells])

    for key, name in {"duration_s": "seconds", **shared.RATES}.items():
        add(name, *(shared.text_of(row[key]) for row in rows))
    add(f"speed, {first['kv']} = 1", *(f"{row['speed_of_first']:.3f}" for row in rows))
    lines += shared.latency_lines(rows)
    add("requests running, mean", *(shared.text_of(row["mean_concurrency"]) for row in rows))
    add("requests running, most", *(shared.text_of(row["max_concurrency"]) for row in rows))
    add("preemptions", *(shared.text_of(row["num_preemptions"]) for row in rows))
    add("prompt tokens found cached", *(shared.text_of(row["cached_tokens"]) for row in rows))
    add("KV bytes/token", *(f"{row['kv_bytes_per_token']:g}" for row in rows))
    add("KV cache, tokens", *(str(row["kv_tokens"]) for row in rows))
    add("KV cache in use, most", *(f"{100 * row['kv_usage_peak']:.1f} %" for row in rows))
    since = "" if first["peak_rss_since"] == "run" else " (since the start)"
    add(f"peak memory, MiB{since}", *(f"{row['peak_rss_bytes'] / 2**20:.0f}" for row in rows))
    return f"{about}\n\n{table(['', *(row['kv'] for row in rows)], lines)}"
