"""Write a page that shows what KV formats cost and save, from stored results.

RESULTS are JSON files that kvant eval and kvant bench stored with --output, or folders of them
(default: benchmarks/results, if it is there). The page is one HTML file that needs no network.
"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from kvant.cli.measuring import check_targets
from kvant.errors import RequestError
from kvant.figure import need_matplotlib

if TYPE_CHECKING:
    from kvant.report import Report

__all__ = ["configure", "run"]

_DEFAULT = Path("benchmarks/results")


def configure(parser: ArgumentParser) -> None:
    """Add the options of ``kvant report``."""
    parser.usage = "kvant report [RESULTS ...] [--output FILE.html] [options]"
    parser.add_argument(
        "results",
        metavar="RESULTS",
        nargs="*",
        help=f"files or folders of results (default: {_DEFAULT})",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the page there (default: report.html, unless only --plots or --markdown "
        "is wanted)",
    )
    parser.add_argument("--plots", metavar="DIR", help="write its charts there as PNG")
    parser.add_argument(
        "--markdown", metavar="FILE", help="write what it says about accuracy as Markdown"
    )
    parser.add_argument("--title", metavar="TEXT", help="of the page")


def run(options: Namespace) -> int:
    """Read, write, and say what was written."""
    if options.output is None and options.plots is None and options.markdown is None:
        options.output = "report.html"
    output = options.output
    check_targets(options)
    from kvant.report import make_report, read_results, render_markdown, render_page
    from kvant.report.layout import counted

    if output is not None or options.plots is not None:
        need_matplotlib()
    report = make_report(read_results(_paths(options.results)), options.title)
    command = shlex.join(["kvant", *sys.argv[1:]])
    if output is not None:
        _write(Path(output), render_page(report, command))
    if options.markdown is not None:
        _write(Path(options.markdown), render_markdown(report, command, options.title))
    if options.plots is not None:
        _plot(report, Path(options.plots))
    left = sum(map(len, report.unused.values())) + len(report.others)
    print(
        f"{counted(len(report.shown), 'result')} shown"
        + (f", {counted(left, 'file')} not shown (the page lists them)" if left else "")
    )
    return 0


def _paths(words: list[str]) -> list[Path]:
    if words:
        return [Path(word) for word in words]
    if not _DEFAULT.is_dir():
        raise RequestError(
            f"no RESULTS are named and there is no folder {_DEFAULT} here; name files that kvant "
            "eval or kvant bench stored with --output"
        )
    return [_DEFAULT]


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    print(path)


def _plot(report: Report, folder: Path) -> None:
    from kvant.report.drawing import save_chart

    folder.mkdir(parents=True, exist_ok=True)
    for chart in report.charts:
        path = folder / f"{chart.name}.png"
        save_chart(chart, path)
        print(path)
