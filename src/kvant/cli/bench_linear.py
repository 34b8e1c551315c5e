"""Measure linear layers: by the shape and the kind of their weights and the number of rows.

Torch's and kvant's take turns, with the ceilings of the machine: bytes read and operations per
second. With MODEL the shapes are those of its layers.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvant.bench.metrics import check_counts
from kvant.bench.plot import plot_linear
from kvant.cli import bench as shared
from kvant.cli import measuring
from kvant.cli.terminal import import_engine, table
from kvant.config import EngineConfig, parse_bytes

if TYPE_CHECKING:
    from kvant.bench.throughput import Row

__all__ = ["configure", "run"]

# The layers of SmolLM2-135M, and of Llama 3 8B without its head.
_SHAPES = "960x576,576x576,3072x576,576x1536,49152x576,6144x4096,4096x4096,28672x4096,4096x14336"


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant bench linear``."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help=measuring.MODEL)
    add(
        "--shapes",
        metavar="LIST",
        help="OUTxIN,... (default: the layers of SmolLM2-135M and Llama 3 8B)",
    )
    rows = "1,4,16,64,512"
    add("--rows", metavar="N,...", default=rows, help=f"rows at a time (default: {rows})")
    add("--kinds", metavar="LIST", help='as "torch bfloat16,kvant int8" (default: all)')
    add("--repeats", metavar="N", type=int, default=5, help="samples of each figure (default: 5)")
    add("--num-threads", metavar="N", type=int, help="threads (default: all cores)")
    add(
        "--cold",
        metavar="X",
        default="256MiB",
        help="read before weights are read again (default: 256MiB)",
    )
    shared.add_files(parser)


def run(options: Namespace) -> int:
    """Measure, print and store."""
    config = EngineConfig(num_threads=options.num_threads)
    rows_at_a_time, cold = shared.integers("rows", options.rows), parse_bytes(options.cold)
    check_counts(rows=rows_at_a_time, repeats=options.repeats)
    measuring.check_targets(options)
    opened = None if options.model is None else measuring.find_model(options, config)
    import_engine()
    from kvant.bench.linear import Shape, choose_kinds, measure_linear, model_shapes
    from kvant.bench.timing import Ceilings
    from kvant.engine.load import share_cores

    threads = share_cores(options.num_threads)
    kinds = choose_kinds(
        [name.strip() for name in (options.kinds or "").split(",") if name], threads
    )
    if options.shapes is None and opened is not None:
        shapes = model_shapes(opened.config)
    else:
        shapes = [Shape.parse(text) for text in (options.shapes or _SHAPES).split(",")]
    rows: list[Row] = []
    total = len(shapes) * len(rows_at_a_time)
    with measuring.ticking("measuring", total, shown=not options.json) as tick:
        ceilings = Ceilings(threads, arithmetic=True)
        for shape in shapes:
            rows += measure_linear(
                kinds,
                shape,
                rows_at_a_time,
                ceilings,
                repeats=options.repeats,
                cold=cold,
                tick=tick,
            )
    shared.finish(options, rows, text=_text, plot=plot_linear, model=options.model)
    return 0


def _text(rows: Sequence[Row]) -> str:
    head = ["out x in", "kind", "rows", "us", "GOP/s", "of peak", "GB/s", "of memory's", "speed"]
    lines = [
        [
            row["shape"],
            row["kind"],
            str(row["rows"]),
            f"{1e6 * row['seconds']:.1f}",
            f"{row['operations_per_second'] / 1e9:.1f}",
            f"{row['percent_of_arithmetic']} %",
            f"{row['bytes_per_second'] / 1e9:.2f}",
            f"{row['percent_of_bandwidth']} %",
            f"{row['speed_of_first']:.2f}",
        ]
        for row in rows
    ]
    about = f"peak: torch's product of large matrices; speed: {rows[0]['kind']} = 1"
    return f"{about}\n\n{table(head, lines, left=(0, 1))}"
