"""Accuracy of KV formats on benchmark data sets, with lm-eval's prompts and metrics.

All formats answer the same questions; the first one is what the others are compared with, question
by question. With --output an evaluation that is interrupted goes on where it was when the same
command runs again.
"""

from __future__ import annotations

import hashlib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.cli import measuring
from kvant.cli.options import add_options, read_options, split_specs
from kvant.cli.terminal import table
from kvant.config import EngineConfig
from kvant.errors import ConfigError, RequestError
from kvant.machine import package_version

if TYPE_CHECKING:
    from kvant.engine.load import OpenModel
    from kvant.eval.tasks.exam import Exam
    from kvant.eval.tasks.journal import Journal
    from kvant.eval.tasks.results import Comparison
    from kvant.formats import KVSpec
    from kvant.models.decoder import DecoderWeights

__all__ = ["configure", "run"]

_OWN = ("kv", "quant_policy", "check")
_TASKS = "hellaswag,arc-easy,piqa,lambada"
_SURE = 0.05  # p below which a difference is marked


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant eval tasks``."""
    add = parser.add_argument
    add("model", metavar="MODEL", help=measuring.MODEL)
    add(
        "--tasks",
        metavar="LIST",
        default=_TASKS,
        help="ceval, mmlu, triviaqa, gsm8k, race-middle, race-high, hellaswag, arc-easy, "
        "arc-challenge, piqa, winogrande, lambada, humaneval, needle, passkey (default: "
        "%(default)s)",
    )
    add(
        "--kv",
        metavar="LIST",
        default="bf16,int8,k4v4",
        help="formats, the first is the baseline (default: %(default)s)",
    )
    add("--data", metavar="DIR", help="folder of local data sets (default: from the hub)")
    add(
        "--limit",
        metavar="N,...",
        help='most questions of a task, spread evenly: a number, or "400,mmlu=1000" for a task of '
        "its own; a smaller limit's questions are among a larger one's",
    )
    add("--num-fewshot", metavar="N", type=int, help="solved examples (default: each task's own)")
    add(
        "--apply-chat-template",
        action="store_true",
        help="ask through the model's chat template, few-shot examples as turns",
    )
    add(
        "--lengths",
        metavar="N,...",
        default="1024,2048,4096",
        help="tokens of the prompts of needle and passkey (default: %(default)s)",
    )
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="humaneval: run programs that the model writes, in a sandbox",
    )
    measuring.add_results(parser)
    add_options(parser, EngineConfig, "engine", without=_OWN)


def run(options: Namespace) -> int:
    """Evaluate, print and store."""
    measuring.need_harness("kvant eval tasks")
    from kvant.eval.tasks.catalogue import find_benchmarks

    names, specs = find_benchmarks(options.tasks), split_specs(options.kv)
    lengths = measuring.numbers("lengths", options.lengths, "1024,4096")
    options.kv = specs[0]
    config = read_options(options, EngineConfig)
    _check(options, names, specs)
    measuring.check_targets(options)
    opened = measuring.find_model(options, config)
    # One length for all formats: a prompt that is cut must be cut alike.
    longest = config.session_len or opened.config.max_positions
    config = replace(config, session_len=longest)
    from kvant.eval.tasks.journal import Journal
    from kvant.eval.tasks.results import compare

    exams = _open_exams(options, names, lengths, opened, longest)
    weights = measuring.load_weights(options, config, opened)
    path = None if options.output is None else Path(f"{options.output}.answers.jsonl")
    with Journal(path, _identity(config, opened)) as journal:
        try:
            rows = _answers(options, config, opened, weights, exams, specs, journal)
        except KeyboardInterrupt:
            _say_how_to_go_on(journal)
            raise
        comparisons = compare(rows)
        found = _describe(options, config, rows, comparisons)
        stored = measuring.store(options, **found)
        journal.remove()
    print(stored if options.json else _text(rows, comparisons))
    return 0


def _check(options: Namespace, names: Sequence[str], specs: Sequence[KVSpec]) -> None:
    from kvant.eval.tasks.catalogue import BENCHMARKS

    for spec in specs:
        if specs.count(spec) > 1:
            raise ConfigError(f"--kv names {spec.label} twice; leave one out")
    unsafe = [name for name in names if BENCHMARKS[name].unsafe]
    if not unsafe:
        return
    if not options.confirm_run_unsafe_code:
        raise ConfigError(
            f"{unsafe[0]} runs programs that the model writes; if you want that (in a sandbox), "
            "add --confirm-run-unsafe-code"
        )
    from kvant.eval.tasks.sandbox import check_sandbox

    check_sandbox()


def _open_exams(
    options: Namespace,
    names: Sequence[str],
    lengths: Sequence[int],
    opened: OpenModel,
    longest: int,
) -> list[Exam]:
    from kvant.eval.tasks.exam import Options, open_exam

    data = None if options.data is None else Path(options.data)
    if data is not None and not data.is_dir():
        raise RequestError(f"--data {data} is no folder")
    tokenizer, chat = opened.tokenizer, opened.tokenizer.chat
    if options.apply_chat_template and chat is None:
        raise ConfigError("this model has no chat template; leave --apply-chat-template out")
    how = Options(
        data=data,
        limits=_limits(options.limit, names),
        num_fewshot=options.num_fewshot,
        chat=chat.render if chat is not None and options.apply_chat_template else None,
        lengths=lengths,
        longest=longest,
        encode=tokenizer.encode,
    )
    with measuring.ticking("reading questions", len(names), shown=not options.json) as tick:
        exams = []
        for name in names:
            exams.append(open_exam(name, how))
            tick(1)
    return exams


def _limits(text: str | None, names: Sequence[str]) -> dict[str, int]:
    """The limit of each task that has one."""
    limits: dict[str, int] = {}
    for piece in [] if text is None else text.split(","):
        name, _, value = (part.strip() for part in piece.rpartition("="))
        if not value.isdecimal() or name in limits or name not in ("", *names):
            raise ConfigError(
                f'--limit "{text}" must be a number, or numbers of tasks that are asked, as '
                f"400,{names[0]}=100"
            )
        limits[name] = int(value)
    return {each: limits.get(each, limits.get("", 0)) for each in names if {each, ""} & {*limits}}


def _identity(config: EngineConfig, opened: OpenModel) -> dict[str, Any]:
    """What answers depend on, besides the format and the question."""
    versions = {name: package_version(name) for name in ("kvant", "lm_eval")}
    return {
        **versions,
        "model": _fingerprint(Path(opened.name)),
        "dtype": config.dtype,
        "weight_dtype": config.weight_dtype,
        "backend": config.backend,
        "session_len": config.session_len,
    }


def _fingerprint(path: Path) -> str:
    """Of the names, sizes and times of a model's files: their bytes may be many."""
    parts = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in parts if p.is_file()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _answers(
    options: Namespace,
    config: EngineConfig,
    opened: OpenModel,
    weights: DecoderWeights,
    exams: Sequence[Exam],
    specs: Sequence[KVSpec],
    journal: Journal,
) -> list[dict[str, Any]]:
    """The rows of all formats: one engine is alive at a time."""
    from kvant.api import Pipeline
    from kvant.engine.load import start_model
    from kvant.eval.tasks.harness import KvantLM
    from kvant.eval.tasks.results import task_row

    def answer(spec: KVSpec) -> Iterator[dict[str, Any]]:
        with Pipeline(start_model(opened, weights, replace(config, kv=spec))) as pipe:
            for exam in exams:
                progress = partial(_progress, f"{spec.label}: {exam.name}", not options.json)
                lm = KvantLM(pipe, journal=journal, progress=progress)
                yield task_row(exam, spec, opened.config.kv_shape, exam.ask(lm))

    return [row for spec in specs for row in answer(spec)]


def _progress(
    title: str, shown: bool, verb: str, total: int
) -> AbstractContextManager[Callable[[int], None]]:
    return measuring.ticking(f"{title}, {verb}", total, shown=shown)


def _say_how_to_go_on(journal: Journal) -> None:
    if journal.path is None:
        hint = "nothing is kept; with --output it could go on"
    else:
        hint = f"{journal.found} answers are in {journal.path}; the same command goes on from there"
    print(f"kvant: interrupted: {hint}", file=sys.stderr)


def _describe(
    options: Namespace,
    config: EngineConfig,
    rows: list[dict[str, Any]],
    comparisons: Sequence[Comparison],
) -> dict[str, Any]:
    return {
        "model": options.model,
        "dtype": config.dtype,
        "weight_dtype": config.weight_dtype,
        "data": "hub" if options.data is None else "local",
        "harness": {"lm_eval": package_version("lm_eval")},
        "limit": _limits(options.limit, [row["task"] for row in rows]) or None,
        "session_len": config.session_len,
        "chat_template": options.apply_chat_template,
        "baseline": rows[0]["kv_spec"],
        "results": rows,
        "comparisons": [asdict(each) for each in comparisons],
    }


def _text(rows: Sequence[dict[str, Any]], comparisons: Sequence[Comparison]) -> str:
    """Tasks by formats; below, what differs from the first format."""
    formats = list(dict.fromkeys(row["kv"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = {(row["task"], row["kv"]): row for row in rows}
    marks = {(each.task, each.kv): each.p_value < _SURE for each in comparisons}
    lines = []
    for task in tasks:
        first = cells[task, formats[0]]
        line = [task, first["metric"], f"{first['num_fewshot']}-shot", _items(first)]
        for kv in formats:
            mark = "*" if marks.get((task, kv)) else " "
            line.append(f"{_percent(cells[task, kv])}{mark}")
        lines.append(line)
    head = ["task", "metric", "shots", "items", *formats]
    text = [f"percent, ± standard error; * differs from {formats[0]} with p < {_SURE}", ""]
    text.append(table(head, lines, left=(0, 1)))
    if comparisons:
        text += ["", f"against {formats[0]}, on the same items:", "", _compared(comparisons)]
    return "\n".join(text)


def _items(row: dict[str, Any]) -> str:
    return str(row["items"]) if row["items"] == row["of"] else f"{row['items']} of {row['of']}"


def _percent(row: dict[str, Any]) -> str:
    error = "" if row["stderr"] is None else f" ± {100 * row['stderr']:.1f}"
    return f"{100 * row['value']:.1f}{error}"


def _compared(comparisons: Sequence[Comparison]) -> str:
    head = ["task", "KV format", "difference", "gained", "lost", "p"]
    lines = [
        [
            each.task,
            each.kv,
            f"{100 * each.difference:+.2f} ± {100 * (each.stderr or 0):.2f}",
            str(each.gained),
            str(each.lost),
            f"{each.p_value:.3f}",
        ]
        for each in comparisons
    ]
    return table(head, lines, left=(0, 1))
