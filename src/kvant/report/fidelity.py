"""Fidelity: rows of several files that were measured alike, as one table and one chart."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kvant.report.charts import Point, loss_chart
from kvant.report.layout import (
    NONE,
    TIMES,
    Cell,
    Chart,
    Section,
    Table,
    count,
    counted,
    decimals,
    in_order,
    signed,
    sized,
)
from kvant.report.names import Formats, order
from kvant.report.stored import Fidelity, FidelityRow, Source

__all__ = ["Alike", "fidelity_groups", "fidelity_section", "kld_chart"]


@dataclass(frozen=True, slots=True)
class _Settings:
    """What must be equal for rows to be compared. The baseline's perplexity tells weights apart,
    which files do not name."""

    model: str
    dtype: str
    weights: str
    baseline: str
    text: str
    sha256: str
    ctx: int
    positions: int
    ppl: float | None


@dataclass(frozen=True, slots=True)
class Alike:
    """Rows measured alike, the newest of each format, larger formats first."""

    settings: _Settings
    formats: Formats
    rows: Mapping[str, FidelityRow]
    sources: tuple[Source, ...]

    @property
    def model(self) -> str:
        """As the user named it."""
        return self.settings.model

    @property
    def baseline(self) -> FidelityRow:
        """The row that the others are compared with."""
        return self.rows[self.settings.baseline]

    @property
    def compared(self) -> list[FidelityRow]:
        """The rows that are not the baseline."""
        return [row for spec, row in self.rows.items() if spec != self.settings.baseline]


def fidelity_groups(sources: Sequence[Source], formats: Formats) -> list[Alike]:
    """Groups of rows that were measured alike; the one of most formats and positions first.

    Args:
        sources: oldest first.
        formats: their names and sizes.
    """
    groups: dict[_Settings, dict[str, tuple[FidelityRow, Source]]] = {}
    for source in sources:
        if isinstance(source.stored, Fidelity):
            for settings, row in _settled(source.stored):
                groups.setdefault(settings, {})[row.kv_spec] = row, source
    alike = [_group(settings, formats, rows) for settings, rows in groups.items()]
    return sorted(alike, key=lambda group: (-len(group.rows), -group.settings.positions))


def _settled(stored: Fidelity) -> list[tuple[_Settings, FidelityRow]]:
    baselines = {row.ctx: row for row in stored.results if row.kv_spec == stored.baseline}
    return [
        (
            _Settings(
                model=stored.model,
                dtype=stored.dtype,
                weights=stored.weight_dtype or _told(stored.command),
                baseline=stored.baseline,
                text=stored.text.source.rpartition("/")[2],
                sha256=stored.text.sha256,
                ctx=row.ctx,
                positions=row.positions,
                ppl=None if (ppl := baselines[row.ctx].ppl) is None else round(ppl, 2),
            ),
            row,
        )
        for row in stored.results
        if row.ctx in baselines
    ]


def _told(command: str) -> str:
    """The value of --weights on a command line."""
    try:
        words = shlex.split(command.replace("=", " "))
    except ValueError:  # a quote that is not closed
        return "auto"
    told = [value for name, value in pairwise(words) if name == "--weights"]
    return told[-1] if told else "auto"


def _group(
    settings: _Settings, formats: Formats, rows: Mapping[str, tuple[FidelityRow, Source]]
) -> Alike:
    def place(spec: str) -> tuple[bool, tuple[int, float, str]]:
        return spec != settings.baseline, order(spec, rows[spec][0].bits_per_element)

    chosen = {spec: rows[spec][0] for spec in sorted(rows, key=place)}
    return Alike(settings, formats, chosen, in_order([source for _, source in rows.values()]))


def kld_chart(group: Alike, limit: float) -> Chart | None:
    """Divergence against bytes; None if no format has any. ``limit`` is drawn as a line."""
    formats = group.formats
    points = [
        Point(formats.label(row.kv_spec), formats.size(row.bits_per_element), row.kld)
        for row in group.compared
        if row.kld is not None and row.kld > 0
    ]
    if not points:
        return None
    best, worst = (pick(points, key=lambda point: point.value) for pick in (min, max))
    return Chart(
        name="divergence",
        title="How far predictions move: KL divergence against memory",
        alt=f"{counted(len(points), 'format')} from {sized(min(p.size for p in points))} to "
        f"{sized(max(p.size for p in points))} {formats.axis}. Mean KL divergence is from "
        f"{decimals(best.value, '.2g')} nats ({best.label}) to {decimals(worst.value, '.2g')} "
        f"({worst.label}). All figures are in the table of fidelity.",
        draw=lambda figure: loss_chart(
            figure,
            points,
            xlabel=formats.axis,
            ylabel="mean KL divergence, nats (log scale)",
            limit=(limit, f"{limit:g}: what kv=auto accepts"),
            log=True,
        ),
        size=(720, 360),
        narrow=(340, 330),
    )


def fidelity_section(
    groups: Sequence[Alike], *, key: str, title: str, place: int
) -> Section | None:
    """A table for every group; None if there is none."""
    if not groups:
        return None
    return Section(
        key=key,
        title=title,
        about="The model reads a text once with each format. KL divergence says how far the "
        "predicted probabilities of the next token move from the baseline's, 0 being not at "
        "all; top-1 how often the likeliest token stays the same.",
        tables=[_table(group) for group in groups],
        sources=in_order([source for group in groups for source in group.sources]),
        place=place,
        accuracy=True,
    )


def _table(group: Alike) -> Table:
    it, base = group.settings, group.baseline
    greedy = next((row.greedy for row in group.rows.values() if row.greedy is not None), None)
    head = ["format", "bits", group.formats.unit, "KL mean", "KL 99 %", "top-1", "perplexity"]
    weights = "" if it.weights == "auto" else f", {it.weights} weights"
    notes = [f"Perplexity of the baseline: {decimals(base.ppl, '.2f')}. ± is a standard error."]
    if len(group.sources) > 1:
        notes.append(
            f"Merged by format from {len(group.sources)} files measured alike; of a format that "
            "several hold, the newest row."
        )
    if greedy is not None:
        head.append("same text for")
        notes.append(f"Same text: tokens of {greedy.tokens} written greedily, median (quartiles).")
    return Table(
        caption=f"{base.windows} {TIMES} {count(it.ctx)} tokens of {it.text}, against "
        f"{group.formats.label(it.baseline)}; {it.dtype}{weights}",
        head=head,
        rows=[
            _cells(row, group.formats, is_base=row is base)[: len(head)]
            for row in group.rows.values()
        ],
        notes=notes,
    )


def _cells(row: FidelityRow, formats: Formats, *, is_base: bool) -> list[Cell]:
    greedy = row.greedy
    error = None if is_base else row.kld_stderr
    return [
        Cell(formats.label(row.kv_spec), "baseline" if is_base else ""),
        Cell(f"{row.bits_per_element:.2f}"),
        Cell(sized(formats.size(row.bits_per_element))),
        Cell(decimals(row.kld, "#.2g"), "" if error is None else f"±{decimals(error, '.1g')}"),
        Cell(decimals(row.kld_p99, "#.2g")),
        Cell(decimals(row.top1_percent, ".2f", " %")),
        Cell(NONE if is_base else signed(row.dppl_percent, 2, " %")),
        Cell(f"{greedy.median:.0f}", f"{greedy.q25:.0f} to {greedy.q75:.0f}")
        if greedy is not None
        else Cell(NONE),
    ]
