"""A report: what is said of each model, from stored results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date

from kvant.report.fidelity import fidelity_groups, fidelity_section, kld_chart
from kvant.report.layout import (
    ACCURACY,
    MORE,
    NONE,
    Cell,
    Chart,
    Section,
    Table,
    counted,
    decimals,
    in_order,
)
from kvant.report.names import (
    describe,
    formats_of,
    label_of,
    measured_rows,
    model_name,
    once,
    order,
)
from kvant.report.speed import (
    attention_section,
    growth_sections,
    linear_section,
    serving_section,
    throughput_section,
)
from kvant.report.stored import (
    Attention,
    Fidelity,
    Found,
    Machine,
    Serving,
    Source,
    Stored,
    Tasks,
    Tune,
)
from kvant.report.tasks import (
    accuracy_section,
    length_section,
    loss_of_tasks_chart,
    task_groups,
)
from kvant.report.verdict import MAX_KLD, MAX_LOSS, Verdict, judge, matching

__all__ = ["ABOUT", "Report", "make_report"]

ABOUT = (
    "A language model keeps keys and values of every token it has read, the KV cache; with long "
    "texts or many users it takes most of the memory. A KV cache format says how many bits each "
    "of these numbers gets: fewer bits hold more tokens in the same memory and are read faster, "
    "but can change what the model says."
)
"""What this is about, for anybody."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is shown.

    title     of the page
    models    their names
    machines  the machines with their versions, newest first
    dates     of the first and the last measurement
    verdicts  which format to take, one for each model that accuracy was measured of
    lead      the charts that stand above all sections
    sections  in order
    shown, others           files that figures are from; files of other kinds
    unused                  files of a known kind of which nothing is shown, by the reason
    """

    title: str
    models: tuple[str, ...]
    machines: tuple[Machine, ...]
    dates: tuple[date, date]
    verdicts: tuple[Verdict, ...]
    lead: tuple[Chart, ...]
    sections: tuple[Section, ...]
    shown: tuple[Source, ...]
    unused: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...]

    @property
    def charts(self) -> list[Chart]:
        """All of them, in order."""
        return [*self.lead, *(chart for section in self.sections for chart in section.charts)]


def make_report(found: Found, title: str | None = None) -> Report:
    """Put a report together.

    Args:
        found: the results, oldest first.
        title: of the page; by default it names the models.
    """
    sources = found.sources
    models = _models(sources)
    parts = [_of_model(model, sources, several=several) for model, several in models.items()]
    sections = [section for part in parts for section in part.sections]
    for make in (attention_section, linear_section):
        if (section := make(sources)) is not None:
            sections.append(section)
    sections = sorted(
        [*sections, *_names_section(sources, list(models))], key=lambda section: section.place
    )
    unique = once("-{}")
    lead = [replace(chart, name=unique(chart.name)) for part in parts for chart in part.lead]
    shown = in_order([source for section in sections for source in section.sources])
    dates = [source.date for source in shown or sources]
    titles = [model_name(m) for m in _models([s for s in sources if not _serves(s)]) or models]
    names = ", ".join(titles)
    return Report(
        title=title or f"KV cache formats{f' for {names}' if names else ''}",
        models=tuple(map(model_name, models)),
        machines=_machines(shown or sources),
        dates=(min(dates), max(dates)),
        verdicts=tuple(part.verdict for part in parts if part.verdict is not None),
        lead=tuple(lead),
        sections=tuple(_own_names(section, unique) for section in sections),
        shown=shown,
        unused=_unused([source for source in sources if source not in shown]),
        others=found.others,
    )


def _serves(source: Source) -> bool:
    """Whether the model of a file is the name that a server gives it."""
    return isinstance(source.stored, Serving)


def _models(sources: Sequence[Source]) -> dict[str, bool]:
    """The models, and whether titles need their names: a server's own name is no second one."""
    known = {model: None for source in sources if (model := getattr(source.stored, "model", None))}
    named = {getattr(source.stored, "model", None) for source in sources if not _serves(source)}
    return dict.fromkeys(known, len(named & known.keys()) > 1)


_REASONS: dict[type[Stored], str] = {
    Fidelity: "newer files have the same formats, or there is no baseline in them",
    Tasks: "other files have the same data sets, newer or with more items, or there is no baseline "
    "in them",
    Attention: "a newer file of the kind is shown, or they time no format against another",
}


def _unused(sources: Sequence[Source]) -> dict[str, tuple[str, ...]]:
    """Names of files, by why nothing of them is shown."""
    names: dict[str, tuple[str, ...]] = {}
    for source in sources:
        why = _REASONS.get(type(source.stored), "newer files have the same measurements")
        names[why] = (*names.get(why, ()), source.name)
    return names


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """What is said of one model."""

    verdict: Verdict | None
    lead: Sequence[Chart]
    sections: Sequence[Section]


def _of_model(model: str, sources: Sequence[Source], *, several: bool) -> _Part:
    mine = [source for source in sources if getattr(source.stored, "model", None) == model]
    formats = formats_of(sources, model)
    tasks, fidelity = task_groups(mine, formats), fidelity_groups(mine, formats)
    # What the verdict is about stands first.
    fidelity.sort(key=lambda each: each is not matching(fidelity, tasks))
    charts = [kld_chart(each, MAX_KLD) for each in fidelity[:1]]
    charts += [loss_of_tasks_chart(each, MAX_LOSS) for each in tasks[:1]]
    lead = [chart for chart in charts if chart is not None]
    sections: list[Section | None] = [
        accuracy_section(
            each,
            key="tasks",
            title="Accuracy on data sets" if each is tasks[0] else "Other settings",
        )
        for each in tasks
    ]
    sections += [
        length_section(each, key="lengths", title="Finding things in long contexts")
        for each in tasks
    ]
    sections += [
        fidelity_section(fidelity[:1], key="fidelity", title="Fidelity", place=ACCURACY),
        fidelity_section(
            fidelity[1:], key="more-fidelity", title="Fidelity, other settings", place=MORE
        ),
        _tune_section(mine),
        *growth_sections(mine, formats),
        throughput_section(mine, formats),
        serving_section(mine),
    ]
    name = model_name(model)
    kept = [section for section in sections if section is not None]
    if several:
        kept = [replace(section, title=f"{section.title}: {name}") for section in kept]
        lead = [replace(chart, title=f"{name}. {chart.title}") for chart in lead]
    return _Part(verdict=judge(model, fidelity, tasks), lead=lead, sections=kept)


def _own_names(section: Section, unique: Callable[[str], str]) -> Section:
    charts = [replace(chart, name=unique(f"speed-{chart.name}")) for chart in section.charts]
    return replace(section, key=unique(section.key), charts=charts)


def _tune_section(sources: Sequence[Source]) -> Section | None:
    """Policies of formats by layer, of the newest file for each budget and text."""
    newest = {
        (found.budget_bits, found.text.source, found.text.sha256, found.dtype): (found, source)
        for source in sources
        if isinstance(found := source.stored, Tune)
    }
    if not newest:
        return None
    return Section(
        key="tuned",
        title="Formats by layer",
        about="kvant eval tune gives the layers that lose most more bits. KL divergence on the "
        "text that it tuned on, and that of the best format that is the same in all layers.",
        tables=[
            Table(
                caption="Tuned for a budget",
                head=["budget, bits", "text", "bits", "KL divergence", "same in all layers", "bits",
                      "KL divergence"],
                rows=[
                    [
                        Cell(f"{found.budget_bits:g}"),
                        Cell(found.text.source.rpartition("/")[2], found.dtype),
                        Cell(f"{found.bits_per_element:.2f}"),
                        Cell(decimals(found.kld, "#.2g")),
                        Cell(NONE if found.uniform_kv is None else label_of(found.uniform_kv)),
                        Cell(decimals(found.uniform_bits_per_element, ".2f")),
                        Cell(decimals(found.uniform_kld, "#.2g")),
                    ]
                    for _, (found, _) in sorted(newest.items(), reverse=True)
                ],
                words=2,
            )
        ],
        sources=[source for _, source in newest.values()],
        place=MORE,
        accuracy=True,
    )  # fmt: skip


def _names_section(sources: Sequence[Source], models: Sequence[str]) -> list[Section]:
    """What the names of formats stand for."""
    bits = {row.kv_spec: row.bits_per_element for row in measured_rows(sources)}
    if not bits:
        return []
    formats = formats_of(sources, models[0])
    table = Table(
        caption="Formats in this report",
        head=["name", "what is stored", "bits per number, all included"],
        rows=[
            [Cell(formats.label(spec)), Cell(describe(spec)), Cell(f"{bits[spec]:.2f}")]
            for spec in sorted(bits, key=lambda spec: order(spec, bits[spec]))
        ],
        notes=[
            f"{counted(len(bits), 'format')}. Rotated: vectors are multiplied by a Hadamard matrix "
            "first, which spreads what stands out. By channel: a scale for each channel of keys "
            "instead of each token. Bits count scales and all else that is stored."
        ],
        words=2,
    )
    return [
        Section(
            key="formats",
            title="What the names mean",
            about="Names like k8v4 give the bits of keys and of values.",
            tables=[table],
            place=MORE,
            accuracy=True,
        )
    ]


def _machines(sources: Sequence[Source]) -> tuple[Machine, ...]:
    """Machines that differ in anything but the date, the newest first."""
    newest = sorted((source.stored.machine for source in sources), key=lambda each: each.date)
    key: Callable[[Machine], str] = lambda each: each.model_dump_json(exclude={"date"})  # noqa: E731
    return tuple(reversed({key(each): each for each in newest}.values()))
