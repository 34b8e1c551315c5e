"""What the tasks of ``kvant bench`` share: formats, engines, tables of results."""

from __future__ import annotations

import csv
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.bench.metrics import LATENCIES, STATISTICS, check_counts
from kvant.cli import measuring
from kvant.cli.options import add_options, read_options, split_specs
from kvant.config import EngineConfig
from kvant.errors import ConfigError
from kvant.formats import KVSpec

if TYPE_CHECKING:
    from kvant.bench.throughput import Row

__all__ = [
    "RATES",
    "add_engine",
    "add_files",
    "finish",
    "integers",
    "latency_lines",
    "read_engine",
    "read_specs",
    "text_of",
]

# The formats are a list here, and the number of sequences is the benchmark's.
_OWN = ("kv", "quant_policy", "max_batch_size")

_ABOUT = dict(
    zip(LATENCIES, ("first token", "per token after it", "between tokens", "request"), strict=True)
)

RATES = {
    "request_throughput": "requests/s",
    "input_throughput": "input tokens/s",
    "output_throughput": "output tokens/s",
    "total_throughput": "total tokens/s",
}
"""Keys of rates and what people call them."""


def add_files(parser: ArgumentParser) -> None:
    """Add ``--json``, ``--output``, ``--csv`` and ``--plot``."""
    measuring.add_results(parser)
    parser.add_argument("--csv", metavar="FILE", help="store the rows there as CSV")
    parser.add_argument("--plot", metavar="FILE", help="draw them (.png, .svg)")


def add_engine(parser: ArgumentParser, *, repeats: int) -> None:
    """Add the options of benchmarks that run a model in an engine."""
    parser.add_argument("model", metavar="MODEL", help=measuring.MODEL)
    parser.add_argument(
        "--kv",
        dest="formats",
        metavar="LIST",
        help='KV formats that take turns, as "bf16,int8,k4v4"; the first is compared with '
        "(default: 16 bit)",
    )
    parser.add_argument(
        "--quant-policy", dest="policies", metavar="LIST", help="LMDeploy's names: 0,8,4"
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=int,
        default=repeats,
        help=f"runs of each format; figures are medians (default: {repeats})",
    )
    parser.add_argument(
        "--seed", metavar="N", type=int, default=0, help="same seed, same requests (default: 0)"
    )
    parser.add_argument(
        "--tp", metavar="N", type=int, default=1, help="tensor parallelism; only 1 so far"
    )
    add_files(parser)
    add_options(parser, EngineConfig, "engine", without=_OWN)


def read_engine(options: Namespace) -> tuple[EngineConfig, list[KVSpec]]:
    """The engine's options and the KV formats.

    Raises:
        ConfigError: a value out of range.
    """
    config = read_options(options, EngineConfig)
    if options.tp != 1:
        raise ConfigError(f"tp={options.tp}: an engine is one process so far; leave --tp out")
    if options.seed < 0:
        raise ConfigError(f"seed={options.seed} must be at least 0")
    check_counts(repeats=options.repeats)
    return config, read_specs(options.formats, options.policies, config)


def read_specs(formats: str | None, policies: str | None, config: EngineConfig) -> list[KVSpec]:
    """The formats of ``--kv`` or ``--quant-policy``, by default that of the engine."""
    if formats is not None and policies is not None:
        raise ConfigError("both --kv and --quant-policy are given; use one of them")
    if formats is not None:
        return split_specs(formats)
    if policies is not None:
        chosen = integers("quant-policy", policies)
        return [EngineConfig(quant_policy=one, dtype=config.dtype).kv_spec() for one in chosen]
    return [config.kv_spec()]


def integers(name: str, text: str) -> list[int]:
    """The whole numbers of a comma list, which option ``--name`` got."""
    return measuring.numbers(name, text, "1,16")


def finish(
    options: Namespace,
    rows: Sequence[Row],
    *,
    text: Callable[[Sequence[Row]], str],
    plot: Callable[[Sequence[Row], Path], None],
    **about: Any,
) -> None:
    """Print results, as a ``text`` or as JSON, and store, tabulate and ``plot`` them where the
    user wants it. ``about`` are further keys of the JSON."""
    stored = measuring.store(options, **about, results=rows)
    print(stored if options.json else text(rows))
    if options.csv is not None:
        _write_csv(rows, Path(options.csv))
    if options.plot is not None:
        plot(rows, Path(options.plot))


def _write_csv(rows: Sequence[Row], path: Path) -> None:
    """A line for every row, a column for every key; lists and dicts as words."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            writer.writerow([_csv_cell(row.get(name)) for name in names])


def _csv_cell(value: Any) -> Any:
    if isinstance(value, dict):
        value = [f"{name}={each}" for name, each in value.items()]
    return " ".join(map(str, value)) if isinstance(value, list) else value


def latency_lines(rows: Sequence[Row]) -> list[list[str]]:
    """For a table with a column for each row: every statistic of every latency."""
    return [
        [
            f"{name.upper()} ({about}), {statistic}, ms",
            *(text_of(row[f"{statistic}_{name}_ms"]) for row in rows),
        ]
        for name, about in _ABOUT.items()
        for statistic in STATISTICS
    ]


def text_of(value: float | None) -> str:
    """Four digits; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
