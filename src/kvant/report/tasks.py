"""Accuracy on data sets: tables in the shape of LMDeploy's (data sets by formats), item by item
against the baseline, and by context length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from kvant.formats import PAGE_TOKENS
from kvant.report.charts import Point, loss_chart
from kvant.report.layout import (
    ACCURACY,
    LENGTHS,
    MINUS,
    NONE,
    Cell,
    Chart,
    Section,
    Table,
    count,
    counted,
    decimals,
    in_order,
    signed,
)
from kvant.report.names import Formats, order
from kvant.report.stored import Comparison, Source, TaskRow, Tasks

__all__ = [
    "SIGNIFICANT",
    "Mean",
    "Measured",
    "accuracy_section",
    "length_section",
    "loss_of_tasks_chart",
    "task_groups",
]

SIGNIFICANT = 0.05
"""p-values below it are marked."""

_CHANCE = 2.0  # standard errors above guessing that a score must have to say anything
_SURE = 1.96  # standard errors: a two-sided interval of 95 %
_FINE = 2 * PAGE_TOKENS  # tokens of a sequence that formats such as k4v4 keep finer
_FEWEST = 6  # items that differ: McNemar's exact p of fewer is never below 0.05


@dataclass(frozen=True, slots=True)
class _Settings:
    model: str
    dtype: str
    weights: str
    data: str
    chat: bool
    baseline: str


@dataclass(frozen=True, slots=True)
class Mean:
    """The change of accuracy over data sets, a share.

    difference  the mean
    stderr      its standard error, None if that of a data set is not known
    doubt       the same with at least the error of one item that differs in each data set: that
                none of a few differs does not make them sure
    worse       data sets where the format is significantly worse, p-values being corrected for
                the number of data sets (Bonferroni)
    """

    difference: float
    stderr: float | None
    doubt: float | None
    worse: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Rows measured alike, by data set and format, all formats of a data set on the same items.

    specs    the formats, the baseline first
    unlike   what is not in it for want of the same items or of a baseline, in words
    """

    settings: _Settings
    formats: Formats
    specs: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: Mapping[tuple[str, str], TaskRow]
    comparisons: Mapping[tuple[str, str], Comparison]
    sources: tuple[Source, ...]
    unlike: tuple[str, ...]

    @property
    def baseline(self) -> str:
        """The format that the others are compared with."""
        return self.settings.baseline

    def label(self, spec: str) -> str:
        """The name of a format."""
        return self.formats.label(spec)

    def bits(self, spec: str) -> float:
        """Per element: they are the same on all data sets."""
        return next(row.bits_per_element for (_, of), row in self.rows.items() if of == spec)

    def size(self, spec: str) -> float:
        """Of a token (:meth:`Formats.size`)."""
        return self.formats.size(self.bits(spec))

    def at_chance(self, task: str) -> bool:
        """Whether the baseline is no better than guessing, so that nothing can be lost."""
        row = self.rows[task, self.baseline]
        return row.value - (row.chance or 0) <= _CHANCE * (row.stderr or 0)

    def is_short(self, task: str) -> bool:
        """Whether prompts are no longer than what some formats keep finer."""
        tokens = self.rows[task, self.baseline].prompt_tokens
        return tokens is not None and tokens <= _FINE

    @property
    def counted(self) -> list[str]:
        """The data sets that say something; with short prompts only if there are no others."""
        some = [task for task in self.tasks if not self.at_chance(task)]
        return [task for task in some if not self.is_short(task)] or some

    def mean(self, spec: str) -> Mean | None:
        """None if the format lacks one of the data sets that count, or there is none."""
        found = [self.comparisons.get((task, spec)) for task in self.counted]
        known = [each for each in found if each is not None]
        if not known or len(known) < len(found):
            return None
        errors = [each.stderr for each in known if each.stderr is not None]
        complete = len(errors) == len(known)
        items = (self.rows[task, spec].items for task in self.counted)
        least = [max(error, 1 / many) for error, many in zip(errors, items, strict=False)]
        sure = SIGNIFICANT / len(known)  # of many data sets some differ by luck
        return Mean(
            difference=sum(each.difference for each in known) / len(known),
            stderr=math.hypot(*errors) / len(known) if complete else None,
            doubt=math.hypot(*least) / len(known) if complete else None,
            worse=tuple(each.task for each in known if _mark(each, sure) < 0),
        )


def _mark(comparison: Comparison, below: float = SIGNIFICANT) -> int:
    """-1 or 1 if a difference is significant, else 0."""
    if comparison.p_value is None or comparison.p_value >= below:
        return 0
    return -1 if comparison.difference < 0 else 1


def task_groups(sources: Sequence[Source], formats: Formats) -> list[Measured]:
    """Groups of rows that were measured alike; the one of most items first.

    Args:
        sources: oldest first.
        formats: their names and sizes.
    """
    groups: dict[_Settings, list[tuple[Tasks, Source]]] = {}
    for source in sources:
        if isinstance(found := source.stored, Tasks):
            settings = _Settings(
                model=found.model,
                dtype=found.dtype,
                weights=found.weight_dtype,
                data=found.data,
                chat=found.chat_template,
                baseline=found.baseline,
            )
            groups.setdefault(settings, []).append((found, source))
    measured = [_merge(settings, formats, each) for settings, each in groups.items()]
    kept = [each for each in measured if each.rows]
    return sorted(kept, key=lambda each: -sum(row.items for row in each.rows.values()))


_Named = TypeVar("_Named", TaskRow, Comparison)
_How = tuple[object, ...]
_Taken = tuple[TaskRow, Comparison | None, Source]


def _how(row: TaskRow) -> _How:
    """What must be equal for rows of a data set to be compared."""
    return row.items, row.items_sha256, row.num_fewshot, row.metric


def _merge(
    settings: _Settings, formats: Formats, files: Sequence[tuple[Tasks, Source]]
) -> Measured:
    files = _told_apart(files)
    ways: dict[str, dict[_How, dict[str, _Taken]]] = {}
    for found, source in reversed(files):
        for row, comparison in _compared(found):
            by_spec = ways.setdefault(row.task, {}).setdefault(_how(row), {})
            by_spec.setdefault(row.kv_spec, (row, comparison, source))
    chosen = {task: _most(by_how.values()) for task, by_how in ways.items()}
    kept = {(task, spec): each for task, rows in chosen.items() for spec, each in rows.items()}
    all_rows = {(row.task, row.kv_spec): None for found, _ in files for row in found.results}
    bits = {spec: row.bits_per_element for (_, spec), (row, _, _) in kept.items()}
    specs = sorted(bits, key=lambda spec: (spec != settings.baseline, order(spec, bits[spec])))
    return Measured(
        settings=settings,
        formats=formats,
        specs=tuple(specs),
        tasks=tuple(dict.fromkeys(task for task, _ in all_rows if task in chosen)),
        rows={key: row for key, (row, _, _) in kept.items()},
        comparisons={key: each for key, (_, each, _) in kept.items() if each is not None},
        sources=in_order([source for _, _, source in kept.values()]),
        unlike=tuple(
            f"{formats.label(spec)} on {task}"
            for task, spec in all_rows
            if (task, spec) not in kept
        ),
    )


def _told_apart(files: Sequence[tuple[Tasks, Source]]) -> list[tuple[Tasks, Source]]:
    """A data set that was asked with several numbers of examples is several, by their names."""
    shots: dict[str, set[int | None]] = {}
    for found, _ in files:
        for row in found.results:
            shots.setdefault(row.task, set()).add(row.num_fewshot)

    def renamed(found: Tasks) -> Tasks:
        names = {
            row.task: f"{row.task}, {row.num_fewshot}-shot"
            for row in found.results
            if len(shots[row.task]) > 1
        }

        def rename(each: _Named) -> _Named:
            return each.model_copy(update={"task": names.get(each.task, each.task)})

        results, pairs = map(rename, found.results), map(rename, found.comparisons)
        return found.model_copy(update={"results": tuple(results), "comparisons": tuple(pairs)})

    return [(renamed(found), source) for found, source in files]


def _compared(found: Tasks) -> Iterator[tuple[TaskRow, Comparison | None]]:
    """The rows whose data set has a baseline on the same items, with their comparison."""
    bases = {row.task: _how(row) for row in found.results if row.kv_spec == found.baseline}
    pairs = {(each.task, each.kv_spec): each for each in found.comparisons}
    for row in found.results:
        if bases.get(row.task) == _how(row):
            is_base = row.kv_spec == found.baseline
            yield row, None if is_base else pairs.get((row.task, row.kv_spec))


def _most(ways: Iterable[dict[str, _Taken]]) -> dict[str, _Taken]:
    """That of most items, or the first of them; a baseline alone compares nothing."""
    return max(ways, key=lambda by_spec: (len(by_spec) > 1, next(iter(by_spec.values()))[0].items))


def loss_of_tasks_chart(group: Measured, limit: float) -> Chart | None:
    """Mean change of accuracy against bytes; None without formats to compare."""
    means = {spec: group.mean(spec) for spec in group.specs}
    points = [Point(group.label(group.baseline), group.size(group.baseline), 0)]
    points += [
        Point(
            group.label(spec),
            group.size(spec),
            100 * mean.difference,
            None if mean.stderr is None else 100 * _SURE * mean.stderr,
        )
        for spec, mean in means.items()
        if mean is not None
    ]
    if len(points) < 2:
        return None
    said = ", ".join(f"{point.label} {signed(point.value)}" for point in points[1:])
    return Chart(
        name="accuracy",
        title="What answers lose: mean change of accuracy against memory",
        alt="Mean change of accuracy in percentage points over "
        f"{counted(len(group.counted), 'data set')} against {points[0].label}: {said}.",
        draw=lambda figure: loss_chart(
            figure,
            points,
            xlabel=group.formats.axis,
            ylabel="mean change of accuracy, points (bars: 95 %)",
            limit=(-100 * limit, f"{signed(-100 * limit, 0)} point"),
            log=False,
        ),
        size=(720, 360),
        narrow=(340, 330),
    )


def accuracy_section(group: Measured, *, key: str, title: str) -> Section:
    """The data sets by formats, and the same item by item."""
    tables = [_accuracy_table(group)]
    if group.comparisons:
        tables.append(_comparison_table(group))
    settings = group.settings
    harness = {
        f"{name} {version}" if version else name
        for source in group.sources
        if isinstance(source.stored, Tasks)
        for name, version in source.stored.harness.items()
    }
    how = [f"{settings.weights} weights"] if settings.weights != "auto" else []
    how += [f"{settings.dtype} computations"] if settings.dtype != "auto" else []
    how += ["questions in the chat template"] if settings.chat else []
    told = f" ({', '.join(how)})" if how else ""
    return Section(
        key=key,
        title=title,
        about="Benchmark questions, answered with each format by the same model with the same "
        f"weights{told}. "
        f"Harness: {', '.join(sorted(harness))}.",
        tables=tables,
        sources=group.sources,
        place=ACCURACY,
        accuracy=True,
    )


def _accuracy_table(group: Measured) -> Table:
    head = ["data set", "items", *map(group.label, group.specs)]
    rows = [_task_cells(group, task) for task in group.tasks]
    notes = [
        "Percent of items that are right, ± standard error. * is a difference from "
        f"{group.label(group.baseline)} on the same items with p < {SIGNIFICANT:g}.{_luck(group)}",
    ]
    if group.counted:
        rows += _mean_rows(group)
    if short := [task for task in group.tasks if group.is_short(task)]:
        notes.append(
            f"Short: prompts of {', '.join(short)} have at most {_FINE} tokens in the mean. "
            f"Formats that keep the first and the latest {_FINE // 2} tokens finer are hardly put "
            f"to the test by them.{'' if {*short} & {*group.counted} else ' Left out of the mean.'}"
        )
    if low := [task for task in group.tasks if group.at_chance(task)]:
        notes.append(
            f"† at chance: {', '.join(low)} {'says' if len(low) == 1 else 'say'} nothing about "
            "formats, as the baseline is within two standard errors of what guessing gives. "
            "Left out of the mean."
        )
    return Table(caption="Accuracy by data set and KV format", head=head, rows=rows, notes=notes)


def _luck(group: Measured) -> str:
    """How many marks say nothing. The test is exact, so luck alone gives fewer than 5 %."""
    pairs = [each for each in group.comparisons.values() if each.gained + each.lost >= _FEWEST]
    if len(pairs) < 1 / SIGNIFICANT:
        return ""
    return (
        f" Of {len(pairs)} comparisons with at least {_FEWEST} items that differ, at most about "
        f"{len(pairs) * SIGNIFICANT:.0f} would be marked by luck alone."
    )


def _task_cells(group: Measured, task: str) -> list[Cell]:
    base = group.rows[task, group.baseline]
    tone = "faint" if group.at_chance(task) else ""
    items = count(base.items)
    whole = "" if base.of in (None, base.items) else f"of {count(base.of or 0)}"
    how = [base.metric]
    if base.num_fewshot is not None and not task.endswith("-shot"):
        how.append(f"{base.num_fewshot}-shot")
    if base.prompt_tokens is not None:
        how.append(f"prompts of {count(round(base.prompt_tokens))} tokens")
    if base.chance is not None:
        how.append(f"guessing {100 * base.chance:.0f} %")
    return [
        Cell(f"{task} †" if tone else task, ", ".join(how), tone),
        Cell(items, whole, tone),
        *(_score(group, task, spec, tone) for spec in group.specs),
    ]


def _score(group: Measured, task: str, spec: str, tone: str) -> Cell:
    row = group.rows.get((task, spec))
    if row is None:
        return Cell(NONE, tone=tone)
    compared = group.comparisons.get((task, spec))
    mark = 0 if compared is None else _mark(compared)
    error = "" if row.stderr is None else f"±{100 * row.stderr:.2f}"
    return Cell(
        f"{100 * row.value:.2f}{'*' if mark else ''}",
        error,
        tone or ("worse", "", "better")[mark + 1],
    )


def _mean_rows(group: Measured) -> list[list[Cell]]:
    """The mean over data sets that count, and its change."""
    tasks = group.counted

    def mean(spec: str) -> Cell:
        values = [group.rows[task, spec].value for task in tasks if (task, spec) in group.rows]
        return Cell(f"{100 * sum(values) / len(values):.2f}" if len(values) == len(tasks) else NONE)

    def change(spec: str) -> Cell:
        found = group.mean(spec)
        if found is None:
            return Cell(NONE)
        return Cell(signed(100 * found.difference), _error(found.stderr))

    items = sum(group.rows[task, group.baseline].items for task in tasks)
    return [
        [
            Cell("mean", f"of {counted(len(tasks), 'data set')}"),
            Cell(count(items)),
            *map(mean, group.specs),
        ],
        [Cell("change of the mean", "points"), Cell(""), *map(change, group.specs)],
    ]


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f"±{100 * stderr:.2f}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else decimals(value, "#.2g")


def _comparison_table(group: Measured) -> Table:
    specs = [spec for spec in group.specs if spec != group.baseline]
    tests = sorted({each.test for each in group.comparisons.values()})

    def cell(task: str, spec: str) -> Cell:
        found = group.comparisons.get((task, spec))
        if found is None:
            return Cell(NONE)
        p = "" if found.p_value is None else f", p {_p(found.p_value)}"
        mark = _mark(found)
        tone = "faint" if group.at_chance(task) else ("worse", "", "better")[mark + 1]
        change = f"{signed(100 * found.difference)} {_error(found.stderr)}{'*' if mark else ''}"
        return Cell(change.strip(), f"+{found.gained} {MINUS}{found.lost}{p}", tone)

    base = group.label(group.baseline)
    return Table(
        caption=f"Item by item against {base}",
        head=["data set", *map(group.label, specs)],
        rows=[
            [Cell(f"{task} †" if group.at_chance(task) else task), *(cell(task, s) for s in specs)]
            for task in group.tasks
        ],
        notes=[
            "Change in percentage points ± its standard error, which is small because both "
            f"answer the same items. Below: + items that are right only with this format, {MINUS} "
            f"only with {base}. p: {', '.join(tests)}."
        ],
    )


def length_section(group: Measured, *, key: str, title: str) -> Section | None:
    """Tasks that were measured at several context lengths, such as a needle in a haystack."""
    tables = [table for task in group.tasks if (table := _length_table(group, task)) is not None]
    if not tables:
        return None
    return Section(
        key=key,
        title=title,
        about="Something to find or to repeat, far back in a text of so many tokens. What a "
        "format forgets shows here first.",
        tables=tables,
        sources=group.sources,
        place=LENGTHS,
        accuracy=True,
    )


def _length_table(group: Measured, task: str) -> Table | None:
    found = {
        spec: group.rows[task, spec].lengths for spec in group.specs if (task, spec) in group.rows
    }
    by_spec = {spec: lengths for spec, lengths in found.items() if lengths}
    if not by_spec:
        return None

    def cell(share: float | None) -> Cell:
        return (
            Cell(NONE)
            if share is None
            else Cell(f"{100 * share:.0f} %", share=min(1, max(0, share)))
        )

    lengths = sorted({length for each in by_spec.values() for length in each})
    return Table(
        caption=f"{task}: found, by length of the context in tokens",
        head=["tokens", *map(group.label, by_spec)],
        rows=[
            [Cell(count(length)), *(cell(each.get(length)) for each in by_spec.values())]
            for length in lengths
        ],
        notes=[f"{group.rows[task, group.baseline].items} items in all."],
    )
