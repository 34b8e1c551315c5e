"""Charts as files and as SVG inside a page, whose colours and font are the page's."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvant.figure import COLOURS, new_figure
from kvant.report.charts import GRID, INK, SOFT
from kvant.report.layout import Chart

__all__ = ["save_chart", "svg_of"]

_INCH = 72
_TAG = re.compile(r"<[^>]*>")  # names of formats are between tags, and stay as they are
_NAMES = {INK: "ink", SOFT: "soft", GRID: "line", "#ffffff": "paper"} | {
    colour: f"c{number}" for number, colour in enumerate(COLOURS)
}


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
    tags = " ".join(_TAG.findall(svg))
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", tags))
    kept = {name for pair in used for name in pair}
    return _TAG.sub(lambda tag: _tag(tag[0], kept), svg)


def _tag(tag: str, kept: Set[str]) -> str:
    """A tag without needless ids, in the font and the colours of the page."""
    tag = re.sub(r' id="([^"]+)"', lambda m: m[0] if m[1] in kept else "", tag)
    tag = re.sub(r"font-family: [^;\"]*", "font-family: var(--text)", tag)
    return re.sub(r"#[0-9a-f]{6}\b", _themed, tag).replace("xlink:href", "href")


def _themed(colour: re.Match[str]) -> str:
    name = _NAMES.get(colour[0])
    return colour[0] if name is None else f"var(--{name})"


@contextmanager
def _style(salt: str, background: str) -> Iterator[None]:
    """matplotlib's own settings, not the user's, but: text as text, nothing in it read as
    mathematics, our colours."""
    from matplotlib.style import context

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
    with context(["default", style]), warnings.catch_warnings():
        # Names may have letters that matplotlib's font lacks; the page's font has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield
