"""Measure a server: requests sent when they are due, whatever it answers and however many run.

Any OpenAI-compatible server will do. Requests come at --request-rate, or with --arrivals trace as
they came to the service that logged them. A rate has requests of its own, so that a server finds
none of their prompts in its cache. Latencies count from when a request was due.
"""

from __future__ import annotations

import argparse
import json
import math
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from kvant.bench.metrics import check_counts
from kvant.bench.plot import plot_serving
from kvant.cli import bench as shared
from kvant.cli import datasets, measuring
from kvant.cli.terminal import import_engine, table
from kvant.client import DEFAULT_URL, authorization, base_url
from kvant.errors import ConfigError

if TYPE_CHECKING:
    from kvant.bench.serving import Load, Row, Server, Slo
    from kvant.bench.workload import Dataset, Vocabulary

__all__ = ["configure", "run"]

_ENDPOINTS = ("completions", "chat")
_ARRIVALS = ("rate", "trace")


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant bench serving``."""
    parser.usage = "kvant bench serving [MODEL_NAME] [options]"
    _add_server(parser)
    datasets.add_dataset(parser)
    add = parser.add_argument
    add("--seed", metavar="N", type=int, default=0, help="same seed, same requests (default: 0)")
    add(
        "--request-rate",
        metavar="R,...",
        help="requests per second on average, one run for each; inf is all at once (default: inf)",
    )
    add(
        "--burstiness",
        metavar="R",
        type=float,
        help="1: Poisson arrivals; less: in bursts; more: regular (default: 1)",
    )
    about = "rate, or trace: at the log's own times, of consecutive requests (default: rate)"
    add("--arrivals", metavar="X", choices=_ARRIVALS, default="rate", help=about)
    add(
        "--speedup",
        metavar="X",
        type=float,
        help="arrivals trace: so many times as fast (default: 1)",
    )
    add(
        "--max-concurrency",
        metavar="N",
        type=int,
        help="most requests at a time; the others wait here, and that counts (default: no limit)",
    )
    add(
        "--slo",
        metavar="LIST",
        help="what a good request keeps, in ms, as ttft:500,tpot:50,e2e:10000; adds goodput",
    )
    shared.add_files(parser)


def _add_server(parser: ArgumentParser) -> None:
    add = parser.add_argument
    about = "the model's name at the server (default: its first)"
    add("model", metavar="MODEL_NAME", nargs="?", help=about)
    add("--url", metavar="URL", default=DEFAULT_URL, help=f"the server (default: {DEFAULT_URL})")
    add("--api-key", metavar="KEY", help="its key (default: that in OPENAI_API_KEY)")
    add(
        "--endpoint",
        metavar="X",
        choices=_ENDPOINTS,
        default="completions",
        help="completions, or chat: a template goes around prompts (default: completions)",
    )
    add(
        "--tokenizer",
        metavar="MODEL",
        help="makes prompts of exact lengths (default: common words, a token each, it is hoped)",
    )
    add("--prompt-ids", action="store_true", help="send token ids, not text; needs --tokenizer")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="outputs of the exact length, where the server can (default: on)",
    )
    add("--extra-body", metavar="JSON", help="more fields of requests, as '{\"top_k\": 1}'")
    about = "seconds that a request may take (default: 600)"
    add("--timeout", metavar="R", type=float, default=600.0, help=about)


def run(options: Namespace) -> int:
    """Measure, print and store; the exit code is 1 if a run had no request that ended well."""
    rates = _rates(options)
    source = datasets.find_source(options)
    _check(options, source)
    measuring.check_targets(options)
    import asyncio

    from kvant.bench.serving import Slo, find_model, measure

    slo = None if options.slo is None else Slo.parse(options.slo)
    server = _server(options)
    dataset = source.read(**({"consecutive": True} if options.arrivals == "trace" else {}))
    server = asyncio.run(find_model(server, options.model))
    vocabulary = _vocabulary(options)
    loads = _loads(options, dataset, vocabulary, rates)
    total = sum(len(load.work) for load in loads)
    with measuring.ticking("measuring", total, shown=not options.json) as tick:
        found = asyncio.run(
            measure(
                server,
                loads,
                vocabulary.tokenizer,
                slo=slo,
                max_concurrency=options.max_concurrency,
                tick=tick,
            )
        )
    names = map(_stored, rates)
    rows = [{"request_rate": name, **row} for name, row in zip(names, found, strict=True)]
    shared.finish(
        options,
        rows,
        text=partial(_text, server, slo),
        plot=partial(plot_serving, title=f"{server.model}, {source.kind}"),
        model=server.model,
        url=server.url,
        workload=_workload(options, source, slo),
    )
    return 0 if all(row["completed"] for row in rows) else 1


def _rates(options: Namespace) -> list[float | None]:
    """Requests per second of each run; None for the times of a trace."""
    if options.arrivals == "trace":
        for name in ("request_rate", "burstiness"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} does not go with --arrivals trace; use --speedup"
                )
        return [None]
    text = "inf" if options.request_rate is None else options.request_rate
    try:
        rates = [float(piece) for piece in text.split(",")]
    except ValueError:
        rates = [math.nan]
    if not all(rate > 0 for rate in rates):
        raise ConfigError(
            f'--request-rate "{text}" must be numbers above 0 with commas between, as 1,2.5,inf'
        )
    return list(rates)


def _stored(rate: float | None) -> float | str | None:
    """A rate as JSON can have it."""
    if rate is None or math.isfinite(rate):
        return int(rate) if rate is not None and rate.is_integer() else rate
    return "inf"


def _check(options: Namespace, source: datasets.Source) -> None:
    """Raise ConfigError for values out of range and options that do not go together."""
    check_counts(max_concurrency=options.max_concurrency)
    if options.seed < 0:
        raise ConfigError(f"seed={options.seed} must be at least 0")
    for name in ("timeout", "speedup", "burstiness"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name}={value:g} must be above 0")
    by_trace = options.arrivals == "trace"
    if by_trace and source.kind != "trace":
        raise ConfigError(f"--arrivals trace needs --dataset trace, not {source.kind}")
    if options.speedup is not None and not by_trace:
        raise ConfigError("--speedup goes with --arrivals trace only")
    if options.prompt_ids and options.endpoint == "chat":
        raise ConfigError("--prompt-ids does not go with --endpoint chat, whose prompts are texts")
    if options.tokenizer is None and (options.prompt_ids or source.kind == "sharegpt"):
        what = "--prompt-ids" if options.prompt_ids else "--dataset sharegpt"
        raise ConfigError(f"{what} needs --tokenizer MODEL, such as the model that is served")


def _server(options: Namespace) -> Server:
    from kvant.bench.serving import Server

    return Server(
        url=base_url(options.url),
        chat=options.endpoint == "chat",
        prompt_ids=options.prompt_ids,
        ignore_eos=options.ignore_eos,
        extra=_extra(options.extra_body),
        headers=authorization(options.api_key),
        timeout=options.timeout,
    )


def _extra(text: str | None) -> dict[str, Any]:
    try:
        extra = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ConfigError(f"--extra-body {text} must be an object, as '{{\"top_k\": 1}}'")
    return extra


def _vocabulary(options: Namespace) -> Vocabulary:
    """What prompts are made of."""
    from kvant.bench.workload import Vocabulary, Words

    if options.tokenizer is None:
        return Vocabulary(Words(), Words.vocab_size)
    from kvant.loading.resolve import resolve_model

    path = resolve_model(options.tokenizer)
    import_engine()
    from kvant.engine.load import open_checkpoint

    tokenizer = open_checkpoint(path).tokenizer()
    return Vocabulary(tokenizer, tokenizer.vocab_size, as_text=not options.prompt_ids)


def _loads(
    options: Namespace,
    dataset: Dataset,
    vocabulary: Vocabulary,
    rates: Sequence[float | None],
) -> list[Load]:
    """Requests for each rate, none of them twice."""
    from kvant.bench.serving import Load, arrival_times
    from kvant.bench.workload import Trace

    count, seed = options.num_prompts, options.seed
    if isinstance(dataset, Trace) and options.arrivals == "trace":
        times = [time / (options.speedup or 1) for time in dataset.arrivals(count, seed)]
        return [Load(work=dataset.draw(count, vocabulary, seed), times=times)]
    try:
        work = dataset.draw(count * len(rates), vocabulary, seed)
    except ConfigError as error:
        if len(rates) == 1:
            raise
        raise ConfigError(f"{error} (each of {len(rates)} rates has {count} of its own)") from None
    burstiness = options.burstiness or 1
    return [
        Load(
            work=work[at * count : (at + 1) * count],
            times=arrival_times(count, rate or math.inf, burstiness=burstiness, seed=seed),
        )
        for at, rate in enumerate(rates)
    ]


def _workload(options: Namespace, source: datasets.Source, slo: Slo | None) -> dict[str, Any]:
    """All that the figures depend on, for JSON."""
    rated = options.arrivals == "rate"
    return {
        **source.describe(),
        "seed": options.seed,
        "arrivals": options.arrivals,
        "burstiness": (options.burstiness or 1) if rated else None,
        "speedup": None if rated else (options.speedup or 1),
        "max_concurrency": options.max_concurrency,
        "endpoint": options.endpoint,
        "tokenizer": options.tokenizer,
        "prompt_ids": options.prompt_ids,
        "ignore_eos": options.ignore_eos,
        "extra_body": _extra(options.extra_body),
        "timeout_s": options.timeout,
        "slo_ms": None if slo is None else dict(slo.limits),
        **source.given,
    }


_COUNTS = {
    "offered_rate": "requests/s that were due",
    "completed": "completed",
    "failed": "failed",
    "total_input_tokens": "input tokens",
    "cached_tokens": "of these found cached",
    "total_output_tokens": "output tokens",
    "short_outputs": "outputs shorter than asked",
    "without_usage": "answers without usage",
    "duration_s": "seconds",
}
_MORE = {
    "mean_concurrency": "requests running, mean",
    "max_concurrency": "requests running, most",
    "max_lag_ms": "latest that one was sent, ms",
}


def _text(server: Server, slo: Slo | None, rows: Sequence[Row]) -> str:
    """A table with a column for each rate, and what failed."""
    names = {**_COUNTS, **shared.RATES}
    if slo is not None:
        limits = ", ".join(f"{name} {limit:g} ms" for name, limit in slo.limits.items())
        names |= {"goodput": f"good requests/s ({limits})", "slo_attainment": "share of them"}
    lines = [_line(name, rows, key) for key, name in names.items()]
    lines += shared.latency_lines(rows)
    lines += [_line(name, rows, key) for key, name in _MORE.items()]
    head = ["request rate", *(str(row["request_rate"] or "as logged") for row in rows)]
    about = f"{server.model} at {server.url}; latencies count from when a request was due"
    return "\n\n".join([about, table(head, lines), *filter(None, map(_failures, rows))])


def _line(name: str, rows: Sequence[Row], key: str) -> list[str]:
    return [name, *(shared.text_of(row[key]) for row in rows)]


def _failures(row: Row) -> str:
    """What went wrong, empty if nothing did."""
    if not row["failed"]:
        return ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in row["failures"].items())
    rate = row["request_rate"] or "as logged"
    return f"failed at {rate}: {kinds}; the first: {row['first_error']}"
