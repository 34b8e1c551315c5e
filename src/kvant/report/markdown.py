"""What a report says about accuracy, as a Markdown document."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from kvant.report.layout import Cell, Table
from kvant.report.report import ABOUT, Report
from kvant.report.verdict import Verdict

__all__ = ["render_markdown"]


def render_markdown(report: Report, command: str, title: str | None = None) -> str:
    """The document; ``command`` is what made it."""
    lines = [f"# {_plain(title or 'Accuracy of KV cache formats')}", "", *_origin(command), ABOUT]
    for verdict in report.verdicts:
        lines += ["", *_verdict(verdict, several=len(report.verdicts) > 1)]
    accuracy = [section for section in report.sections if section.accuracy]
    for section in accuracy:
        lines += ["", f"## {_plain(section.title)}", "", _plain(section.about)]
        for table in section.tables:
            lines += ["", *_table(table)]
        if section.sources:
            dates = [source.date for source in section.sources]
            lines += ["", f"Measured {_between(min(dates), max(dates))}:", ""]
            for source in section.sources:
                lines += [f"- `{source.name}`", "", *_code(source.stored.command, "  "), ""]
            lines.pop()
    lines += ["", "## Measured on", ""]
    for machine in report.machines:
        cores = "" if machine.cores is None else f", {machine.cores} cores"
        versions = ", ".join(f"{n} {v}" for n, v in machine.versions.items() if v is not None)
        isa = f" ({', '.join(machine.isa)})" if machine.isa else ""
        lines.append(_plain(f"- {machine.cpu}{cores}{isa}: {versions}"))
    return "\n".join(lines) + "\n"


def _origin(command: str) -> list[str]:
    return ["Written from stored results by this command; do not edit:", "", *_code(command), ""]


def _verdict(verdict: Verdict, *, several: bool) -> Iterator[str]:
    heading = "Which format to take"
    yield f"## {heading}{f': {_plain(verdict.model)}' if several else ''}"
    yield ""
    named = verdict.taken or verdict.provisional
    told = "" if named is None else f" `{_code_word(named)}`"
    yield f"**{verdict.headline}{told}.** {_plain(verdict.reason)}"
    yield from ("", _plain(verdict.rule), "")
    yield from _table(verdict.ladder)


def _table(table: Table) -> Iterator[str]:
    yield f"**{_plain(table.caption)}**"
    yield ""
    yield _row([_plain(word) for word in table.head])
    yield _row(["---"] * table.words + ["---:"] * (len(table.head) - table.words))
    for row in table.rows:
        yield _row([_cell(cell) for cell in row])
    for note in table.notes:
        yield from ("", _plain(note))


def _cell(cell: Cell) -> str:
    text = _plain(cell.text)
    if cell.tone == "taken" and text:
        text = f"**{text}**"
    if not cell.detail:
        return text
    detail = _plain(cell.detail)
    return f"{text} {detail}" if detail.startswith("±") else f"{text} ({detail})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """Text that Markdown takes as it stands, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _code(text: str, indent: str = "") -> list[str]:
    """A block of code; one line, which cannot end the block."""
    return [f"{indent}    {' '.join(text.split())}"]


def _code_word(text: str) -> str:
    return text.replace("`", "'")


def _between(first: object, last: object) -> str:
    return f"on {first}" if first == last else f"from {first} to {last}"
