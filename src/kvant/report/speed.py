"""Speed: how it grows with context and with requests at a time, a data set's throughput,
kernels. Of equal measurements the newest is shown; timings of different runs are never mixed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import PurePath
from typing import Any, TypeVar

from kvant.report.charts import growth_chart
from kvant.report.layout import (
    KERNELS,
    NONE,
    TIMES,
    Cell,
    Chart,
    Section,
    Table,
    count,
    decimals,
    in_order,
    times,
)
from kvant.report.names import Formats, is_16_bit
from kvant.report.stored import (
    Attention,
    AttentionRow,
    Latency,
    LatencyRow,
    Linear,
    Serving,
    Source,
    Speed,
    Stored,
    Throughput,
)

__all__ = [
    "attention_section",
    "growth_sections",
    "linear_section",
    "serving_section",
    "throughput_section",
]

T = TypeVar("T", bound=Stored)


@dataclass(frozen=True, slots=True)
class _Axis:
    """What grows: the key of its values, its name, and the sentence of its section."""

    key: str
    title: str
    label: str
    fixed: tuple[str, ...]


_AXES = (
    _Axis("prompt_tokens", "Speed by context", "tokens of the prompt", ("concurrency",)),
    _Axis("concurrency", "Speed by requests at a time", "requests at a time", ("prompt_tokens",)),
)
_AXIS_KEYS = "completion_tokens", "weight_dtype"

_PANELS: tuple[tuple[str, str, str, float], ...] = (
    ("throughput", "output tokens/s, prompt included", "output_throughput", 1),
    ("ttft", "seconds to the first token (TTFT)", "median_ttft_ms", 1e-3),
    ("tpot", "ms per token after it (TPOT)", "median_tpot_ms", 1),
)


@dataclass(frozen=True, slots=True)
class _Series:
    """Rows of a file where nothing but an axis and the format changes."""

    axis: _Axis
    rows: Sequence[LatencyRow]
    source: Source
    dtype: str

    @property
    def facts(self) -> tuple[str, ...]:
        """What does not change, in words."""
        row = self.rows[0]
        at = "one request" if row.concurrency == 1 else f"{row.concurrency} requests at a time"
        return (
            at if self.axis.key == "prompt_tokens" else f"prompts of {count(row.prompt_tokens)} "
            "tokens",
            f"{row.completion_tokens} tokens generated",
            f"{row.weight_dtype} weights",
            f"dtype {self.dtype}",
        )  # fmt: skip


def growth_sections(sources: Sequence[Source], formats: Formats) -> list[Section]:
    """Charts and a table for each axis along which static batches were measured, and a table of
    those that no axis has.

    Args:
        sources: of one model, oldest first.
        formats: their names.
    """
    series: dict[tuple[object, ...], _Series] = {}
    single: dict[tuple[object, ...], tuple[LatencyRow, Source]] = {}
    for source in sources:
        if isinstance(found := source.stored, Latency):
            alone = {id(row): row for row in found.results}
            for axis in _AXES:
                for fixed, rows in _series(axis, found.results).items():
                    series[(axis, found.dtype, *fixed)] = _Series(axis, rows, source, found.dtype)
                    alone = {key: row for key, row in alone.items() if row not in rows}
            for row in alone.values():
                single[(found.dtype, row.kv_spec, *_case(row))] = row, source
    sections = []
    for axis in _AXES:
        alike = [each for each in series.values() if each.axis is axis]
        sections += [_growth_section(each, alike, formats) for each in alike]
    return [*sections, *([_single_section(list(single.values()), formats)] if single else [])]


def _case(row: LatencyRow) -> tuple[int, int, int, str]:
    return row.prompt_tokens, row.concurrency, row.completion_tokens, row.weight_dtype


def _series(axis: _Axis, rows: Sequence[LatencyRow]) -> dict[tuple[object, ...], list[LatencyRow]]:
    """The rows of a file where nothing but the axis and the format changes."""
    groups: dict[tuple[object, ...], list[LatencyRow]] = {}
    for row in rows:
        fixed = tuple(getattr(row, key) for key in (*axis.fixed, *_AXIS_KEYS))
        groups.setdefault(fixed, []).append(row)
    return {
        fixed: rows
        for fixed, rows in groups.items()
        if len({getattr(row, axis.key) for row in rows}) > 1
    }


def _growth_section(series: _Series, alike: Sequence[_Series], formats: Formats) -> Section:
    """The title names what tells the section from those ``alike``."""
    axis, facts, number = series.axis, series.facts, alike.index(series)
    told = [fact for fact, *others in zip(facts, *(each.facts for each in alike), strict=True)
            if len(set(others)) > 1]  # fmt: skip
    key = f"{axis.key.replace('_', '-')}{f'-{number}' if number else ''}"
    by_format: dict[str, list[LatencyRow]] = {}
    for row in series.rows:
        by_format.setdefault(formats.label(row.kv_spec), []).append(row)
    charts = [
        chart
        for panel in _PANELS
        if (chart := _growth_chart(axis, key, by_format, panel)) is not None
    ]
    return Section(
        key=f"by-{key}",
        title=", ".join([axis.title, *told]),
        about=f"{', '.join(facts).capitalize()}. Medians over requests.",
        charts=charts,
        tables=[_growth_table(axis, by_format)],
        sources=[series.source],
    )


def _single_section(found: Sequence[tuple[LatencyRow, Source]], formats: Formats) -> Section:
    return Section(
        key="static-batch",
        title="Speed of single cases",
        about="Static batches of which neither the context nor the number of requests grows. "
        "Medians over requests.",
        tables=[
            Table(
                caption="Output tokens per second; below, time to the first token, then per token",
                head=["format", "prompt, tokens", "requests", "generated", "weights", "tokens/s"],
                rows=[
                    [
                        Cell(formats.label(row.kv_spec)),
                        *(Cell(count(value)) for value in _case(row)[:3]),
                        Cell(row.weight_dtype),
                        _rate(row),
                    ]
                    for row, _ in found
                ],
            )
        ],
        sources=in_order([source for _, source in found]),
    )


def _rate(row: LatencyRow) -> Cell:
    first = decimals(None if (ms := row.median_ttft_ms) is None else ms / 1e3, "#.3g", " s")
    detail = f"{first}, then {decimals(row.median_tpot_ms, '#.3g', ' ms')}"
    return Cell(decimals(row.output_throughput, "#.4g"), detail)


def _growth_chart(
    axis: _Axis,
    key: str,
    by_format: Mapping[str, Sequence[LatencyRow]],
    panel: tuple[str, str, str, float],
) -> Chart | None:
    name, title, value_key, unit = panel
    lines = {
        label: [
            (float(getattr(row, axis.key)), unit * value)
            for row in sorted(rows, key=attrgetter(axis.key))
            if (value := getattr(row, value_key)) is not None
        ]
        for label, rows in by_format.items()
    }
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return None
    ends = ", ".join(f"{label} {decimals(points[-1][1])}" for label, points in lines.items())
    last = max(x for points in lines.values() for x, _ in points)
    return Chart(
        name=f"{key}-{name}",
        title=f"{axis.title}: {title}",
        alt=f"{title[0].upper()}{title[1:]}, over {axis.label}. At {count(last)}: {ends}.",
        draw=partial(growth_chart, lines=lines, title=title, xlabel=axis.label),
        size=(300, 225),
    )


def _growth_table(axis: _Axis, by_format: Mapping[str, Sequence[LatencyRow]]) -> Table:
    values = sorted({getattr(row, axis.key) for rows in by_format.values() for row in rows})

    def cell(rows: Sequence[LatencyRow], value: int) -> Cell:
        row = next((row for row in rows if getattr(row, axis.key) == value), None)
        return Cell(NONE) if row is None else _rate(row)

    return Table(
        caption="Output tokens per second; below, time to the first token, then per token",
        head=[axis.label, *by_format],
        rows=[[Cell(count(v)), *(cell(rows, v) for rows in by_format.values())] for v in values],
    )


def throughput_section(sources: Sequence[Source], formats: Formats) -> Section | None:
    """A table in the shape of LMDeploy's (requests per second and their ratio to 16 bit) for
    each workload, of the newest file."""
    newest: dict[tuple[str, ...], tuple[Throughput, Source]] = {}
    for source in sources:
        found = source.stored
        if isinstance(found, Throughput):
            workload = json.dumps(found.workload, sort_keys=True)
            newest[found.dtype, found.results[0].weight_dtype, workload] = found, source
    if not newest:
        return None
    return Section(
        key="throughput",
        title="Throughput of a data set",
        about="Requests of a data set, some at a time. In the same memory a smaller format holds "
        "more tokens, so more requests run at once; the last column says what the cache held.",
        tables=[_throughput_table(found, formats) for found, _ in newest.values()],
        sources=[source for _, source in newest.values()],
    )


def _throughput_table(found: Throughput, formats: Formats) -> Table:
    rows, first = found.results, found.results[0]
    base = next((row for row in rows if is_16_bit(row.kv_spec)), first)
    name = _data_of(found.workload)
    at = found.workload.get("concurrency")
    return Table(
        caption=f"{name}, {count(first.completed)} requests, {at} at a time",
        head=[
            "format", "requests/s", f"against {formats.label(base.kv_spec)}", "output tokens/s",
            "TTFT, s", "TPOT, ms", "running at once", "preempted", "cache, tokens",
        ],
        rows=[_throughput_cells(row, base, formats) for row in rows],
        notes=[
            f"{count(first.total_input_tokens)} tokens in, {count(first.total_output_tokens)} out, "
            f"{first.weight_dtype} weights. TTFT: time to the first token, waiting included; TPOT: "
            "per token after it; medians, below them the 99th percentile."
        ],
    )  # fmt: skip


def _data_of(workload: Mapping[str, Any]) -> str:
    """The data set and its file."""
    file = PurePath(str(workload.get("dataset_path") or "")).name
    return f"{workload.get('dataset')}{f' {file}' if file else ''}"


def _throughput_cells(row: Speed, base: Speed, formats: Formats) -> list[Cell]:
    def seconds(ms: float | None) -> str:
        return decimals(None if ms is None else ms / 1e3, "#.3g")

    rate, first = row.request_throughput, base.request_throughput
    return [
        Cell(formats.label(row.kv_spec), "baseline" if row is base else ""),
        Cell(decimals(row.request_throughput)),
        Cell(times(rate / first) if first else NONE),
        Cell(decimals(row.output_throughput, "#.4g")),
        Cell(seconds(row.median_ttft_ms), seconds(row.p99_ttft_ms)),
        Cell(decimals(row.median_tpot_ms), decimals(row.p99_tpot_ms)),
        Cell(decimals(row.mean_concurrency)),
        Cell(count(row.num_preemptions)),
        Cell(count(row.kv_tokens)),
    ]


def _newest(
    sources: Sequence[Source], kind: type[T], wanted: Callable[[T], bool] = bool
) -> tuple[T, Source] | None:
    for source in reversed(sources):
        if isinstance(found := source.stored, kind) and wanted(found):
            return found, source
    return None


def attention_section(sources: Sequence[Source]) -> Section | None:
    """The kernels' time against that of the first format, at the longest context of each shape."""
    newest = _newest(sources, Attention, lambda found: bool(_decodes(found)))
    if newest is None:
        return None
    found, source = newest
    return Section(
        key="attention",
        title="Attention kernels",
        place=KERNELS,
        about="One new token reads the cache of one layer. Times against the first format: 0.5 is "
        "half the time, which is what half the bytes allow at best.",
        tables=[_attention_table(_decodes(found))],
        sources=[source],
    )


def _decodes(found: Attention) -> list[AttentionRow]:
    return [row for row in found.results if row.what == "decode" and row.times_first is not None]


def _attention_table(rows: Sequence[AttentionRow]) -> Table:
    longest: dict[tuple[str | None, int | None], int] = {}
    for row in rows:
        case = row.shape, row.batch
        longest[case] = max(longest.get(case, 0), row.context or 0)
    formats = list(dict.fromkeys(row.kv or "" for row in rows))
    found = {(row.shape, row.batch, row.context, row.kv): row for row in rows}

    def cell(case: tuple[str | None, int | None], kv: str) -> Cell:
        row = found.get((*case, longest[case], kv))
        if row is None:
            return Cell(NONE)
        took = decimals(None if row.seconds is None else 1e3 * row.seconds, "#.3g", " ms")
        return Cell(f"{row.times_first:.2f}", took)

    return Table(
        caption="Time of a decode, first format = 1",
        head=["heads / KV heads / size", "sequences", "context", *formats],
        rows=[
            [
                Cell(str(case[0])),
                Cell(str(case[1])),
                Cell(count(longest[case])),
                *(cell(case, kv) for kv in formats),
            ]
            for case in longest
        ],
    )


def linear_section(sources: Sequence[Source]) -> Section | None:
    """Linear layers by kind of weights: time, and speed against the first kind."""
    newest = _newest(sources, Linear)
    if newest is None:
        return None
    found, source = newest
    kinds = list(dict.fromkeys(row.kind for row in found.results))
    cases = list(dict.fromkeys((row.shape, row.rows) for row in found.results))
    seconds = {(row.shape, row.rows, row.kind): row.seconds for row in found.results}

    def cell(case: tuple[str, int], kind: str) -> Cell:
        took, first = seconds.get((*case, kind)), seconds.get((*case, kinds[0]))
        if took is None:
            return Cell(NONE)
        return Cell(
            decimals(1e3 * took, "#.3g", " ms"), times(first / took) if first and took else ""
        )

    return Section(
        key="linear",
        title="Linear layers",
        place=KERNELS,
        about=f"Time of a layer by kind of weights; below it the speed, {kinds[0]} = 1.",
        tables=[
            Table(
                caption="Time of a layer",
                head=[f"outputs {TIMES} inputs", "rows", *kinds],
                rows=[
                    [Cell(case[0]), Cell(str(case[1])), *(cell(case, kind) for kind in kinds)]
                    for case in cases
                ],
            )
        ],
        sources=[source],
    )


def serving_section(sources: Sequence[Source]) -> Section | None:
    """A table for each workload, of the newest file."""
    newest = {
        json.dumps(found.workload, sort_keys=True): (found, source)
        for source in sources
        if isinstance(found := source.stored, Serving)
    }
    if not newest:
        return None
    return Section(
        key="serving",
        title="A server under load",
        about="Requests come at a rate that does not wait for answers. Median times, below them "
        "the 99th percentile.",
        tables=[_serving_table(found) for found, _ in newest.values()],
        sources=in_order([source for _, source in newest.values()]),
    )


def _serving_table(found: Serving) -> Table:
    def both(row: object, name: str) -> Cell:
        middle, worst = (getattr(row, f"{each}_{name}_ms") for each in ("median", "p99"))
        return Cell(decimals(middle, "#.4g"), decimals(worst, "#.4g"))

    return Table(
        caption=f"{_data_of(found.workload)} over HTTP",
        head=["requests/s asked", "completed", "failed", "requests/s", "output tokens/s",
              "first token, ms", "between tokens, ms"],
        rows=[
            [
                Cell("as logged" if row.request_rate is None else str(row.request_rate)),
                Cell(count(row.completed)),
                Cell(count(row.failed)),
                Cell(decimals(row.request_throughput)),
                Cell(decimals(row.output_throughput, "#.4g")),
                both(row, "ttft"),
                both(row, "itl"),
            ]
            for row in found.results
        ],
    )  # fmt: skip
