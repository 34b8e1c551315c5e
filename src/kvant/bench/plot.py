"""The pictures of benchmarks: formats or kinds against each other, one colour each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvant.figure import COLOURS, MARKERS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_attention", "plot_latency", "plot_linear", "plot_serving", "plot_throughput"]

Row = dict[str, Any]

_LINES = ("-", "--", ":", "-.")
_COLUMNS = 3
_LATENCIES = {"ttft": "time to first token", "itl": "between tokens", "e2e": "whole request"}
_PERCENTILES = ("median", "p90", "p99")
_RATES = {
    "offered_rate": "sent",
    "request_throughput": "completed",
    "goodput": "completed within the SLO",
}


def plot_throughput(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Output tokens per second of each format, and latencies: the median and up to the 99th
    percentile."""
    figure = new_figure(11, 1.6 + 0.45 * len(rows))
    first, *others = figure.subplots(1, 1 + len(_LATENCIES), sharey=True)
    places, rates = range(len(rows)), [row["output_throughput"] for row in rows]
    first.barh(places, rates, height=0.6, color=COLOURS[0])
    for place, row in zip(places, rows, strict=True):
        text = f" {row['output_throughput']:.4g}   x{row['speed_of_first']:.2f}"
        first.text(row["output_throughput"], place, text, va="center", fontsize=9)
    first.set_yticks(places, [row["kv"] for row in rows])
    first.invert_yaxis()
    first.set_xlim(0, 1.45 * max(rates))
    first.set_xlabel("output tokens per second")
    tidy(first, title)
    for axes, (name, about) in zip(others, _LATENCIES.items(), strict=True):
        for place, row in zip(places, rows, strict=True):
            middle, worst = row[f"median_{name}_ms"], row[f"p99_{name}_ms"]
            if middle is not None:
                axes.plot([middle, worst], [place, place], color=COLOURS[0], linewidth=2)
                axes.plot([middle], [place], "o", color=COLOURS[0], markersize=7)
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms, median to p99")
        tidy(axes, about)
    figure.savefig(path)


def plot_serving(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Requests per second that were sent, completed and good, and percentiles of latencies, over
    the request rate."""
    figure = new_figure(13, 3.6)
    first, *others = figure.subplots(1, 1 + len(_LATENCIES))
    _curves(first, rows, _RATES)
    first.set_ylabel("requests per second")
    tidy(first, title)
    for axes, (name, about) in zip(others, _LATENCIES.items(), strict=True):
        _curves(axes, rows, {f"{each}_{name}_ms": each for each in _PERCENTILES})
        axes.set_ylabel("ms")
        tidy(axes, about)
    figure.savefig(path)


def _curves(axes: Axes, rows: Sequence[Row], names: Mapping[str, str]) -> None:
    """A line for each key of rows that has values, over the request rate."""
    for number, (key, name) in enumerate(names.items()):
        points = [(at, row[key]) for at, row in enumerate(rows) if row[key] is not None]
        if points:
            places, values = zip(*points, strict=True)
            axes.plot(places, values, f"{MARKERS[number]}-", color=COLOURS[number], label=name)
    axes.set_xticks(range(len(rows)), [str(row["request_rate"] or "as logged") for row in rows])
    axes.margins(x=0.1)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests per second asked for")
    if axes.has_data():
        axes.legend(frameon=False, fontsize=8)


def plot_latency(rows: Sequence[Row], path: Path) -> None:
    """Output tokens per second over the batch; a panel for each pair of lengths."""
    figure, panels = _panels(
        rows, lambda row: f"{row['prompt_tokens']} + {row['completion_tokens']} tokens"
    )
    for axes, some in panels:
        _lines(axes, some, x="concurrency", y="output_throughput", colour="kv")
        axes.set_xlabel("requests at a time")
        axes.set_ylabel("output tokens per second")
        axes.set_ylim(bottom=0)
    _save(figure, panels[0][0], path)


def plot_attention(rows: Sequence[Row], path: Path) -> None:
    """Time of a layer over context; a panel for each shape, a line style for each batch."""
    chosen = [row for row in rows if row["what"] == "decode" and "kv" in row]
    figure, panels = _panels(chosen, lambda row: str(row["shape"]))
    for axes, some in panels:
        _lines(axes, some, x="context", y="seconds", colour="kv", style="batch")
        axes.set_xlabel("context, tokens (title: heads/KV heads/head_dim)")
        axes.set_ylabel("seconds of a layer")
        axes.set_yscale("log")
    _save(figure, panels[0][0], path)


def plot_linear(rows: Sequence[Row], path: Path) -> None:
    """Operations per second over rows, and the ceilings of arithmetic; a panel for each shape."""
    figure, panels = _panels(rows, lambda row: f"{row['shape']} (out x in)")
    for axes, some in panels:
        _lines(axes, some, x="rows", y="operations_per_second", colour="kind")
        for ceiling in {row["arithmetic"] for row in some}:
            axes.axhline(ceiling, color="#57606a", linewidth=0.8, linestyle=":")
        axes.set_xlabel("rows")
        axes.set_ylabel("operations per second")
        axes.set_yscale("log")
    _save(figure, panels[0][0], path)


def _panels(
    rows: Sequence[Row], name: Callable[[Row], str]
) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """A figure with a panel for every name that rows have, and the rows of each."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(name(row), []).append(row)
    columns = min(_COLUMNS, max(1, len(groups)))
    lines = max(1, math.ceil(len(groups) / columns))
    figure = new_figure(4.6 * columns, 3.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for unused in axes[max(1, len(groups)) :]:
        unused.set_visible(False)
    panels = list(zip(axes, groups.values(), strict=False))
    for each, title in zip(axes, groups, strict=False):
        tidy(each, title)
    return figure, panels or [(axes[0], [])]


def _lines(
    axes: Axes, rows: Sequence[Row], *, x: str, y: str, colour: str, style: str | None = None
) -> None:
    """A line for each value of ``colour`` and of ``style``."""
    colours = list(dict.fromkeys(row[colour] for row in rows))
    styles = list(dict.fromkeys(row[style] for row in rows)) if style else [None]
    for number, value in enumerate(colours):
        for line, kind in enumerate(styles):
            some = [r for r in rows if r[colour] == value and (not style or r[style] == kind)]
            axes.plot(
                [row[x] for row in some],
                [row[y] for row in some],
                _LINES[line % len(_LINES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                color=COLOURS[number % len(COLOURS)],
                label=str(value) if not style else f"{value}, {style} {kind}",
            )
    ticks = sorted({row[x] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()


def _save(figure: Figure, axes: Axes, path: Path) -> None:
    """Write it, with the legend of one panel for all."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, frameon=False, loc="outside right upper", fontsize=8)
    figure.savefig(path)
