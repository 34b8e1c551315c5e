"""Measure what KV formats cost on a model and a text.

Teacher-forced through the real engine and cache, each format against a baseline on the same
weights: KL divergence of the next token, agreement of the most likely token, perplexity, how long
greedy texts stay the same, and the signal to noise ratio of keys and values by layer.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from kvant.cli import eval as shared
from kvant.cli import measuring
from kvant.cli.options import split_specs
from kvant.cli.prompts import read_prompts
from kvant.cli.terminal import table

if TYPE_CHECKING:
    from kvant.eval.fidelity import FidelityRow

__all__ = ["configure", "run"]


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant eval fidelity``."""
    parser.add_argument(
        "--kv",
        metavar="LIST",
        default="k8v8,k8v4,k5v4,k4v4,k4v3",
        help='formats, as "int8,k=int8h,v=int4h,k4v4" (default: %(default)s)',
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
    shared.add_measuring(parser, ctx="2048", windows=6)


def run(options: Namespace) -> int:
    """Evaluate and print."""
    specs = split_specs(options.kv)
    config = shared.read_config(options)
    contexts = shared.contexts(options.ctx)
    prompts = None if options.prompts is None else read_prompts((), options.prompts)
    measuring.check_targets(options)
    text = shared.open_text(options)
    opened = measuring.find_model(options, config)
    from kvant.eval.fidelity import evaluate, make_plan

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
    shared.note_text(options, plan.windows)
    weights = measuring.load_weights(options, config, opened)
    with measuring.ticking("evaluating", plan.num_tokens, shown=not options.json) as tick:
        rows = evaluate(opened, weights, config, plan, tick)
    found = {"baseline": rows[0].kv_spec, "results": [asdict(row) for row in rows]}
    stored = shared.store(options, config, text, found)
    print(stored if options.json else _text(rows))
    if options.plot is not None:
        from kvant.eval.plot import plot

        plot(rows, Path(options.plot), model=Path(options.model).name)
    return 0


def _text(rows: Sequence[FidelityRow]) -> str:
    """A table for each context length, with the worst layers below."""
    contexts = dict.fromkeys(row.ctx for row in rows)
    return "\n\n".join(_section([row for row in rows if row.ctx == ctx]) for ctx in contexts)


def _section(rows: Sequence[FidelityRow]) -> str:
    first = rows[0]
    head = ["KV format", "bits", "bytes/token", "perplexity", "change", "KL mean", "99 %", "99.9 %",
            "top-1"]  # fmt: skip
    lines = [f"{first.windows} x {first.ctx} tokens, against {first.label}"]
    if first.greedy is not None:
        head += ["greedy", "quartiles", "same"]
        lines[0] += (
            f"; greedy: {len(first.greedy.first_diverging)} x {first.greedy.tokens} tokens, "
            "median index of the first that differs"
        )
    width = max(len(row.label) for row in rows)
    worst = [f"{row.label:<{width}}  {_layers(row)}" for row in rows if row.worst_layers]
    lines += ["", table(head, [_cells(row)[: len(head)] for row in rows])]
    if worst:
        lines += ["", "Layers whose keys or values lose most, signal to noise:", "", *worst]
    return "\n".join(lines)


def _cells(row: FidelityRow) -> list[str]:
    cells = [
        row.label,
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
