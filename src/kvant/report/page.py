"""A report as one HTML file: no other file, no network, no script."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kvant import __version__
from kvant.report.drawing import svg_of
from kvant.report.layout import Chart
from kvant.report.report import ABOUT, Report

__all__ = ["render_page"]


def render_page(report: Report, command: str) -> str:
    """The page. Charts are drawn twice where telephones need another shape; the style sheet
    shows one. ``command`` is what made the page."""
    templates = Environment(
        loader=PackageLoader("kvant.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (files("kvant.report") / "page" / "style.css").read_text(encoding="utf-8")
    return templates.get_template("report.html").render(
        report=report,
        about=ABOUT,
        style=Markup(style),
        drawn={id(chart): _svgs(chart) for chart in report.charts},
        key_of=id,
        command=command,
        version=__version__,
    )


def _svgs(chart: Chart) -> list[tuple[str, Markup]]:
    """Pairs of a class and a picture; matplotlib escapes what is in it."""
    if chart.narrow is None:
        return [("", Markup(svg_of(chart)))]
    return [("wide", Markup(svg_of(chart))), ("narrow", Markup(svg_of(chart, narrow=True)))]
