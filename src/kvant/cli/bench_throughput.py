"""Measure requests per second: a data set through the engine, some requests at a time.

Each KV format of --kv gets the same requests, in turns; when one ends the next is sent. Output
lengths are exact (end tokens are passed over), decoding is greedy.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.bench.metrics import check_counts
from kvant.cli import bench as shared
from kvant.cli import measuring
from kvant.cli.terminal import table
from kvant.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from kvant.bench.throughput import Row
    from kvant.bench.workload import Dataset

__all__ = ["configure", "run"]

# The options of each kind of data set.
_OPTIONS = {
    "sharegpt": ("output_len", "max_input_len", "max_output_len"),
    "random": ("input_len", "output_len", "range_ratio"),
    "trace": ("max_input_len", "max_output_len"),
}
_SUFFIXES = {".json": "sharegpt", ".csv": "trace", ".jsonl": "trace"}


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant bench throughput``."""
    add = parser.add_argument
    add(
        "--dataset",
        "--dataset-name",
        metavar="X",
        default="random",
        help="sharegpt, random, trace, or a file, whose name tells: .json is sharegpt, .csv and "
        ".jsonl are traces; all may be .gz (default: random)",
    )
    add("--dataset-path", metavar="FILE", help="the file of sharegpt or trace")
    _add_number(parser, "--num-prompts", 100, "requests")
    _add_number(parser, "--concurrency", 16, "requests at a time")
    add("--input-len", metavar="N", type=int, help="random: tokens of prompts (default: 1024)")
    add(
        "--output-len",
        metavar="N",
        type=int,
        help="random: tokens to generate (default: 128); sharegpt: instead of the answers' lengths",
    )
    add(
        "--range-ratio",
        metavar="R",
        type=float,
        help="random: lengths from R times the length to the length (default: 1)",
    )
    add(
        "--max-input-len",
        metavar="N",
        type=int,
        help="trace: prompts are cut to it; sharegpt: longer ones are left out (default: 1024)",
    )
    add(
        "--max-output-len",
        metavar="N",
        type=int,
        help="trace: outputs are cut to it; sharegpt: longer answers are left out",
    )
    shared.add_engine(parser, repeats=1)


def _add_number(parser: ArgumentParser, name: str, default: int, about: str) -> None:
    help_text = f"{about} (default: {default})"
    parser.add_argument(name, metavar="N", type=int, default=default, help=help_text)


def run(options: Namespace) -> int:
    """Measure, print and store."""
    config, specs = shared.read_engine(options)
    check_counts(num_prompts=options.num_prompts, concurrency=options.concurrency)
    kind, path = _source(options)
    given = _given(options, kind)
    dataset = _read(kind, path, given)
    measuring.check_targets(options)
    opened = measuring.find_model(options, config)
    from kvant.bench.throughput import Bench, check_fit, num_tokens
    from kvant.bench.workload import Vocabulary

    vocabulary = Vocabulary(opened.tokenizer, opened.config.vocab_size)
    work = dataset.draw(options.num_prompts, vocabulary, options.seed)
    for spec in specs:
        check_fit(opened, config, spec, work, options.concurrency)
    weights = measuring.load_weights(options, config, opened)
    total = options.repeats * len(specs) * num_tokens(work)
    with measuring.ticking("measuring", total, shown=not options.json) as tick:
        bench = Bench(opened=opened, weights=weights, config=config, tick=tick)
        runs = bench.compare(specs, work, options.concurrency, options.repeats)
    rows = [bench.row(spec, each, runs[0]) for spec, each in zip(specs, runs, strict=True)]
    stored = measuring.store(
        options,
        model=options.model,
        dtype=config.dtype,
        workload={
            "dataset": kind,
            "dataset_path": path,
            "num_prompts": options.num_prompts,
            "concurrency": options.concurrency,
            "repeats": options.repeats,
            "seed": options.seed,
            **given,
        },
        results=rows,
    )
    print(stored if options.json else _text(rows, options))
    if options.csv is not None:
        shared.write_csv(rows, Path(options.csv))
    if options.plot is not None:
        from kvant.bench.plot import plot_throughput

        title = f"{Path(options.model).name}, {options.concurrency} at a time"
        plot_throughput(rows, Path(options.plot), title=title)
    return 0


def _source(options: Namespace) -> tuple[str, str | None]:
    """The kind of data set asked for, and its file if it has one."""
    kind, path = options.dataset, options.dataset_path
    if kind not in _OPTIONS:
        suffix = Path(kind.removesuffix(".gz")).suffix
        if suffix not in _SUFFIXES:
            raise ConfigError(
                f'no data set "{kind}"{did_you_mean(kind, _OPTIONS)} Data sets: '
                f"{', '.join(_OPTIONS)}, or a .json, .csv or .jsonl file"
            )
        if path is not None:
            raise ConfigError("both --dataset and --dataset-path name a file; use one of them")
        kind, path = _SUFFIXES[suffix], kind
    if (path is None) != (kind == "random"):
        what = "takes no" if kind == "random" else "needs a"
        raise ConfigError(f"--dataset {kind} {what} file in --dataset-path")
    return kind, path


def _given(options: Namespace, kind: str) -> dict[str, Any]:
    """The lengths that the user gave."""
    names = dict.fromkeys(name for some in _OPTIONS.values() for name in some)
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name in given:
        if name not in _OPTIONS[kind]:
            raise ConfigError(
                f"{_option(name)} does not go with --dataset {kind}, which takes "
                f"{', '.join(map(_option, _OPTIONS[kind]))}"
            )
    return given


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _read(kind: str, path: str | None, given: dict[str, Any]) -> Dataset:
    from kvant.bench.workload import Random, ShareGPT, Trace

    if path is None:
        return Random(**given)
    return (ShareGPT if kind == "sharegpt" else Trace)(Path(path), **given)


def _text(rows: Sequence[Row], options: Namespace) -> str:
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
