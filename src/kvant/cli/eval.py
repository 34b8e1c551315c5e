"""Measure what KV formats cost on a model and a text.

Teacher-forced through the real engine and cache, each format against a baseline on the same
weights: KL divergence of the next token, agreement of the most likely token, perplexity, how long
greedy texts stay the same, and the signal to noise ratio of keys and values by layer.
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvant.cli.options import add_options, read_options, split_specs
from kvant.cli.prompts import read_prompts
from kvant.cli.terminal import import_engine, progress, table
from kvant.config import EngineConfig
from kvant.errors import ConfigError, RequestError
from kvant.machine import machine

if TYPE_CHECKING:
    from kvant.eval.fidelity import FidelityRow, Plan, Tick

__all__ = ["configure", "run"]

# The formats, the dtype and all sizes are this command's own.
_OWN = (
    "kv", "quant_policy", "dtype", "session_len", "max_batch_size", "cache_max_entry_count",
    "kv_memory", "kv_tokens", "enable_prefix_caching", "check",
)  # fmt: skip


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant eval``."""
    parser.usage = "kvant eval fidelity MODEL [options]"
    parser.add_argument("task", metavar="fidelity", choices=("fidelity",), help="what to measure")
    parser.add_argument("model", metavar="MODEL", help="a folder, a .gguf file or a hub name")
    parser.add_argument(
        "--kv",
        metavar="LIST",
        default="int8,int8h,k8v4h,int4h",
        help='formats, as "int8,k=int8h,v=int4h,int4h+r64" (default: %(default)s)',
    )
    parser.add_argument(
        "--baseline", metavar="KV", default="f32", help="format to compare with (default: f32)"
    )
    parser.add_argument(
        "--dtype",
        metavar="X",
        default="float32",
        help="weights and activations: float32, bfloat16, float16 or auto (default: float32, so "
        "that the cache is all that differs)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8, may be .gz (default: Python's own documentation)"
    )
    parser.add_argument(
        "--ctx", metavar="N,...", default="2048", help="context lengths (default: 2048)"
    )
    parser.add_argument(
        "--windows",
        metavar="N",
        type=int,
        default=6,
        help="pieces of text for each context length (default: 6)",
    )
    parser.add_argument(
        "--greedy",
        metavar="N",
        type=int,
        default=64,
        help="tokens to generate for each prompt, 0 for none (default: 64)",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts for --greedy, read as generate --file does (default: the beginning of each "
        "piece of text)",
    )
    parser.add_argument("--plot", metavar="FILE", help="draw divergence against bits (.png, .svg)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", metavar="FILE", help="store the JSON there too")
    add_options(parser, EngineConfig, "engine", without=_OWN)


def run(options: Namespace) -> int:
    """Evaluate and print."""
    specs = split_specs(options.kv)
    options.kv = options.baseline
    config = read_options(options, EngineConfig)
    contexts = _contexts(options.ctx)
    prompts = None if options.prompts is None else read_prompts((), options.prompts)
    for name in ("output", "plot"):
        _check_target(name, getattr(options, name))

    from kvant.eval.plot import check_plot, plot
    from kvant.eval.text import default_text, read_text
    from kvant.loading.resolve import resolve_model

    if options.plot is not None:
        check_plot(Path(options.plot))
    text = default_text() if options.text is None else read_text(Path(options.text))
    path = resolve_model(options.model, revision=config.revision, download_dir=config.download_dir)
    import_engine()
    from kvant.engine.load import open_model
    from kvant.eval.fidelity import evaluate, make_plan

    opened = open_model(str(path), config)
    plan = make_plan(
        opened,
        text,
        baseline=config.kv_spec(),
        specs=specs,
        contexts=contexts,
        windows=options.windows,
        greedy=options.greedy,
        prompts=prompts,
    )
    for note in _notes(options, plan):
        print(note, file=sys.stderr)
    with progress(f"loading {options.model}", shown=not options.json) as on_load:
        weights = opened.weights(config.dtype, on_load)
    with _ticking("evaluating", plan.num_tokens, shown=not options.json) as tick:
        rows = evaluate(opened, weights, config, plan, tick)
    document = {
        "machine": machine(),
        "command": shlex.join(["kvant", *sys.argv[1:]]),
        "model": options.model,
        "text": text.describe(),
        "dtype": config.dtype,
        "baseline": rows[0].kv_spec,
        "results": [asdict(row) for row in rows],
    }
    stored = json.dumps(document, indent=2, allow_nan=False)
    if options.output is not None:
        Path(options.output).write_text(stored + "\n", encoding="utf-8")
    print(stored if options.json else _text(rows))
    if options.plot is not None:
        plot(rows, Path(options.plot), model=Path(options.model).name)
    return 0


def _contexts(text: str) -> list[int]:
    try:
        return [int(piece) for piece in text.split(",")]
    except ValueError:
        raise ConfigError(
            f'--ctx "{text}" must be whole numbers with commas between, as 2048,8192'
        ) from None


def _check_target(name: str, path: str | None) -> None:
    """Raise RequestError if a file cannot be written there: better now than in an hour."""
    if path is None:
        return
    if Path(path).is_dir() or not Path(path).absolute().parent.is_dir():
        raise RequestError(f"--{name} {path} is a folder or in a folder that is not there")


def _notes(options: Namespace, plan: Plan) -> Iterator[str]:
    """What the user did not ask for but gets."""
    if options.text is None:
        yield "text: Python's own documentation (pydoc_data.topics); choose another with --text"
    for ctx, windows in plan.windows.items():
        if len(windows) < options.windows:
            yield (
                f"text: it is long enough for {len(windows)} of {options.windows} windows of "
                f"{ctx} tokens"
            )


@contextmanager
def _ticking(title: str, total: int, *, shown: bool) -> Iterator[Tick]:
    """A progress bar that is told how much more is done."""
    done = 0
    with progress(title, shown=shown) as bar:

        def tick(count: int) -> None:
            nonlocal done
            done += count
            bar(done, total)

        yield tick


def _text(rows: Sequence[FidelityRow]) -> str:
    """A table for each context length, with the worst layers below."""
    contexts = dict.fromkeys(row.ctx for row in rows)
    return "\n\n".join(_section([row for row in rows if row.ctx == ctx]) for ctx in contexts)


def _section(rows: Sequence[FidelityRow]) -> str:
    first = rows[0]
    head = ["KV format", "bits", "bytes/token", "perplexity", "change", "KL mean", "99 %", "99.9 %",
            "top-1"]  # fmt: skip
    lines = [f"{first.windows} x {first.ctx} tokens, against {first.kv_spec}"]
    if first.greedy is not None:
        head += ["greedy", "quartiles", "same"]
        lines[0] += (
            f"; greedy: {len(first.greedy.first_diverging)} x {first.greedy.tokens} tokens, "
            "median index of the first that differs"
        )
    width = max(len(row.kv_spec) for row in rows)
    worst = [f"{row.kv_spec:<{width}}  {_layers(row)}" for row in rows if row.worst_layers]
    lines += ["", table(head, [_cells(row)[: len(head)] for row in rows])]
    if worst:
        lines += ["", "Layers whose keys or values lose most, signal to noise:", "", *worst]
    return "\n".join(lines)


def _cells(row: FidelityRow) -> list[str]:
    cells = [
        row.kv_spec,
        f"{row.bits_per_element:.2f}",
        f"{row.bytes_per_token:g}",
        _cell(row.ppl, "{:.3f}"),
        _cell(row.dppl_percent, "{:+.2f} %"),
        _cell(row.kld, "{:.2g}"),
        _cell(row.kld_p99, "{:.2g}"),
        _cell(row.kld_p999, "{:.2g}"),
        _cell(row.top1_percent, "{:.2f} %"),
    ]
    if (greedy := row.greedy) is None:
        return [*cells, "-", "-", "-"]
    quartiles = f"{greedy.q25:.0f}-{greedy.q75:.0f}"
    return [*cells, f"{greedy.median:.0f}", quartiles, f"{greedy.same_percent:.0f} %"]


def _cell(value: float | None, pattern: str) -> str:
    return "-" if value is None else pattern.format(value)


def _layers(row: FidelityRow) -> str:
    return ", ".join(
        f"{each.side.upper()} of layer {each.layer} {each.sqnr_db:.1f} dB"
        for each in row.worst_layers
    )
