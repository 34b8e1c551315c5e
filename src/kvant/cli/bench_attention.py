"""Measure attention over quantized pages: kernels, without a model's other work.

decode  one new token of each of --batch sequences: bytes of pages per second against the machine's
        bandwidth; time against the first format of --kv
sdpa    the same, and a chunk of 2048 tokens behind 4096, against torch
write   shares of writing and attending of MODEL's steps

Formats take turns; figures are medians. Data is cold: all pages are read once before any is read
again. With MODEL the shape is its own, and write is measured too.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvant.bench.metrics import check_counts
from kvant.bench.plot import plot_attention
from kvant.cli import bench as shared
from kvant.cli import measuring
from kvant.cli.terminal import import_engine, table
from kvant.config import EngineConfig, parse_bytes
from kvant.errors import ConfigError

if TYPE_CHECKING:
    from kvant.bench.attention import Heads, Plan
    from kvant.bench.throughput import Row
    from kvant.engine.load import OpenModel

__all__ = ["configure", "run"]

_PARTS = ("decode", "sdpa", "write")
_SHAPES, _SDPA_SHAPES = "9/3/64,32/8/128,32/32/128,16/1/256", "9/3/64"


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant bench attention``."""
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help=measuring.MODEL)
    formats = "bf16,int8,int8h,int4,int4h,k8v8,k8v4,k4v4"
    add("--kv", dest="formats", metavar="LIST", default=formats, help=_default("formats", formats))
    add("--parts", metavar="LIST", help="of decode, sdpa, write (default: decode,sdpa)")
    shapes = _default("heads/KV heads/head_dim", _SHAPES)
    add("--shapes", metavar="LIST", help=shapes)
    add("--sdpa-shapes", metavar="LIST", help=_default("those of sdpa", _SDPA_SHAPES))
    contexts = "1024,2048,4096,8192,16384,32768,65536"
    about = _default("tokens, multiples of 64 from 128", contexts)
    add("--contexts", metavar="N,...", default=contexts, help=about)
    add("--batch", metavar="N,...", default="1,8", help=_default("sequences", "1,8"))
    for name, default, about in (
        ("--repeats", 11, "samples of each figure"),
        ("--layers", 4, "most layers of a pool"),
        ("--prompt", 1024, "write: tokens of its prompts, a multiple of 512"),
        ("--model-repeats", 3, "write: passes"),
    ):
        add(name, metavar="N", type=int, default=default, help=_default(about, str(default)))
    add("--num-threads", metavar="N", type=int, help="threads (default: all cores)")
    add("--backend", metavar="X", default="cpu", help=_default("whose kernels, on a CPU", "cpu"))
    about = _default("read before anything is read again", "256MiB")
    add("--cold", metavar="X", default="256MiB", help=about)
    about = _default("memory of all formats' pages", "6GiB")
    add("--max-bytes", metavar="X", default="6GiB", help=about)
    shared.add_files(parser)


def _default(about: str, default: str) -> str:
    return f"{about} (default: {default})"


def run(options: Namespace) -> int:
    """Measure, print and store."""
    config = EngineConfig(num_threads=options.num_threads, backend=options.backend)
    specs = shared.read_specs(options.formats, None, config)
    parts = _parts(options)
    lists = {name: shared.integers(name, getattr(options, name)) for name in ("contexts", "batch")}
    check_counts(model_repeats=options.model_repeats, prompt=options.prompt)
    if options.prompt % 512:
        raise ConfigError(f"prompt={options.prompt} must be a multiple of 512")
    sizes = {name: parse_bytes(getattr(options, name)) for name in ("cold", "max_bytes")}
    measuring.check_targets(options)
    opened = None if options.model is None else measuring.find_model(options, config)
    import_engine()
    from kvant.bench.attention import Plan
    from kvant.engine.load import share_cores

    plan = Plan(
        specs=specs,
        backend=options.backend,
        threads=share_cores(options.num_threads),
        batches=lists["batch"],
        contexts=lists["contexts"],
        repeats=options.repeats,
        layers=options.layers,
        **sizes,
    )
    rows = _measure(options, config, plan, parts, opened)
    shared.finish(options, rows, text=_text, plot=plot_attention, model=options.model)
    return 0


def _parts(options: Namespace) -> list[str]:
    """What to measure."""
    if options.parts is None:
        return [part for part in _PARTS if part != "write" or options.model is not None]
    parts = [part.strip() for part in options.parts.split(",")]
    for part in parts:
        if part not in _PARTS:
            raise ConfigError(f'no part "{part}"; parts: {", ".join(_PARTS)}')
    if "write" in parts and options.model is None:
        raise ConfigError("the part write runs a model; name one, as smollm2-135m")
    return parts


def _shapes(text: str | None, default: str, opened: OpenModel | None) -> list[Heads]:
    """As asked, or a model's, or the default."""
    from kvant.bench.attention import Heads

    if text is None and opened is not None:
        model = opened.config
        return [Heads(model.num_heads, model.num_kv_heads, model.head_dim)]
    return [Heads.parse(each) for each in (text or default).split(",")]


def _measure(
    options: Namespace,
    config: EngineConfig,
    plan: Plan,
    parts: Sequence[str],
    opened: OpenModel | None,
) -> list[Row]:
    from kvant.bench.attention import measure_decode
    from kvant.bench.sdpa import measure_sdpa
    from kvant.bench.steps import measure_steps
    from kvant.bench.timing import Ceilings

    shapes = {
        "decode": _shapes(options.shapes, _SHAPES, opened),
        "sdpa": _shapes(options.sdpa_shapes, _SDPA_SHAPES, opened),
    }
    cases = {
        "decode": len(shapes["decode"]) * len(plan.batches) * len(plan.contexts),
        "sdpa": len(shapes["sdpa"]),
        "write": 2 * options.model_repeats,
    }
    for part in parts:
        for shape in shapes.get(part, ()):
            plan.check(shape)
    rows: list[Row] = []
    total, shown = sum(cases[part] for part in parts), not options.json
    weights = None
    if opened is not None and "write" in parts:
        weights = measuring.load_weights(options, config, opened)
    with measuring.ticking("measuring", total, shown=shown) as tick:
        ceilings = Ceilings(plan.threads)
        for shape in shapes["decode"] if "decode" in parts else ():
            rows += measure_decode(plan, shape, ceilings, tick)
        for shape in shapes["sdpa"] if "sdpa" in parts else ():
            rows += measure_sdpa(plan, shape, _say)
            tick(1)
        if opened is not None and weights is not None:
            passes = options.model_repeats
            rows += measure_steps(opened, weights, config, plan, options.prompt, passes, tick)
    return rows


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of a table: its title, the key of its values, and how they are shown."""

    title: str
    key: str
    show: Callable[[Any], str] = str


_TABLES = {
    "decode": (
        _Column("shape", "shape"),
        _Column("batch", "batch"),
        _Column("context", "context"),
        _Column("KV format", "kv"),
        _Column("us", "seconds", lambda value: f"{1e6 * value:.1f}"),
        _Column("MiB", "bytes", lambda value: f"{value / 2**20:.2f}"),
        _Column("GB/s", "bytes_per_second", lambda value: f"{value / 1e9:.2f}"),
        _Column("of memory's", "percent_of_bandwidth", lambda value: f"{value} %"),
        _Column("time of first", "times_first"),
        _Column("", "note"),
    ),
    "slope": (
        _Column("shape", "shape"),
        _Column("batch", "batch"),
        _Column("KV format", "kv"),
        _Column("ns/token", "seconds_per_token", lambda value: f"{1e9 * value:.4g}"),
        _Column("us at 0", "seconds_at_0", lambda value: f"{1e6 * value:.1f}"),
        _Column("contexts", "points"),
        _Column("slope of first", "times_first"),
    ),
    "sdpa": (
        _Column("what", "what"),
        _Column("shape", "shape"),
        _Column("context", "context"),
        _Column("KV format", "kv"),
        _Column("us", "seconds", lambda value: f"{1e6 * value:.1f}"),
        _Column("speed, torch's best = 1", "speed_of_torch"),
    ),
    "write": (
        _Column("step", "step"),
        _Column("KV format", "kv"),
        _Column("rows", "rows"),
        _Column("step, ms", "step_seconds", lambda value: f"{1e3 * value:.2f}"),
        _Column("write, ms", "write_seconds", lambda value: f"{1e3 * value:.3f}"),
        _Column("write", "write_percent", lambda value: f"{value} %"),
        _Column("attend", "attend_percent", lambda value: f"{value} %"),
    ),
}


def _text(rows: Sequence[Row]) -> str:
    """A table for each part."""
    tables = []
    for what, columns in _TABLES.items():
        chosen = [row for row in rows if row["what"].startswith(what)]
        lines = [
            [column.show(row[column.key]) if column.key in row else "" for column in columns]
            for row in chosen
        ]
        if lines:
            tables.append(table([column.title for column in columns], lines))
    return "\n\n".join(tables)
