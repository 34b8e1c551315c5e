"""Charts as files and as SVG inside a page, whose colours and font are the page's."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvant.figure import COLOURS, check_plot, new_figure
from kvant.report.charts import GRID, INK, SOFT
from kvant.report.layout import Chart

__all__ = ["check_drawing", "save_chart", "svg_of"]

_INCH = 72
_NAMES = {INK: "ink", SOFT: "soft", GRID: "line", "#ffffff": "paper"} | {
    colour: f"c{number}" for number, colour in enumerate(COLOURS)
}


def check_drawing() -> None:
    """Raise ConfigError if matplotlib is missing."""
    check_plot(Path("report.svg"))


def save_chart(chart: Chart, path: Path) -> None:
    """Write a chart in its wide size, on white."""
    with _style(chart.name, "#ffffff"):
        figure = new_figure(chart.size[0] / _INCH, chart.size[1] / _INCH)
        chart.draw(figure)
        figure.savefig(path)


def svg_of(chart: Chart, *, narrow: bool = False) -> str:
    """An ``<svg>`` element without ids but those that it refers to itself, hidden from screen
    readers: the page says in words what is in it."""
    width, height = chart.narrow if narrow and chart.narrow is not None else chart.size
    stream = io.StringIO()
    with _style(f"{chart.name} {narrow}", "none"):
        figure = new_figure(width / _INCH, height / _INCH)
        chart.draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening = f'<svg viewBox="0 0 {width:g} {height:g}" aria-hidden="true">'
    svg = re.sub(r"<svg [^>]*>", opening, svg)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg))
    kept = {name for pair in used for name in pair}
    svg = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in kept else "", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--text)", svg)
    return re.sub(r"#[0-9a-f]{6}\b", _themed, svg).replace("xlink:href", "href")


def _themed(colour: re.Match[str]) -> str:
    name = _NAMES.get(colour[0])
    return colour[0] if name is None else f"var(--{name})"


@contextmanager
def _style(salt: str, background: str) -> Iterator[None]:
    """matplotlib's settings: text as text, nothing in it read as mathematics, our colours."""
    import matplotlib as mpl

    style: dict[Any, Any] = {
        "axes.edgecolor": SOFT,
        "axes.facecolor": background,
        "axes.labelcolor": SOFT,
        "axes.titlecolor": INK,
        "figure.facecolor": background,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "text.color": INK,
        "text.parse_math": False,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
    }
    with mpl.rc_context(style), warnings.catch_warnings():
        # Names may have letters that matplotlib's font lacks; the page's font has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
