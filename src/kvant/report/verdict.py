"""Which format to take: the smallest one that keeps within stated limits, and the formats that
no other one beats in size and in loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvant.formats.auto import BOUND
from kvant.report.charts import front
from kvant.report.fidelity import Alike
from kvant.report.layout import Cell, Table, counted, decimals, signed, sized, times
from kvant.report.names import Formats, describe, is_by_layer, model_name, order
from kvant.report.tasks import SIGNIFICANT, Mean, Measured

__all__ = ["MAX_KLD", "MAX_LOSS", "Verdict", "judge", "matching"]

MAX_LOSS = 0.01
"""Mean accuracy that a format may lose, a share: one percentage point."""

MAX_KLD = BOUND
"""Mean KL divergence, nats, that a format may have: what ``kv="auto"`` accepts."""

_ONE_SIDED = 1.645  # standard errors: the lower end of a one-sided interval of 95 %
_SIXTEEN = 16  # bits per element of the cache that formats have to be smaller than

# Whether a format keeps the limits.
_YES, _NO, _FEW, _LACKS = "yes", "no", "too few items", "not all measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A format, what was measured of it, and whether it keeps the limits."""

    kv_spec: str
    bits: float
    kld: float | None
    mean: Mean | None
    keeps: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """For one model.

    model        its name
    headline     in few words, without the format
    taken        the name of the format to take, None if none is shown to keep the limits
    provisional  without that: the format that may keep them, if any
    reason       what it costs and saves, a sentence or two
    rule         how it was chosen, and what was not considered
    ladder       the formats that no other one beats, from large to small
    """

    model: str
    headline: str
    taken: str | None
    provisional: str | None
    reason: str
    rule: str
    ladder: Table


def matching(fidelity: Sequence[Alike], tasks: Sequence[Measured]) -> Alike | None:
    """The first measurement of fidelity, with the weights that the data sets were asked with."""
    weights = {tasks[0].settings.weights} if tasks and _decides(tasks[0]) else None
    fitting = (each for each in fidelity if weights is None or each.settings.weights in weights)
    return next(fitting, None)


def judge(model: str, fidelity: Sequence[Alike], tasks: Sequence[Measured]) -> Verdict | None:
    """Decide; None without anything to decide from.

    Args:
        model: whose formats.
        fidelity: all that was measured; the first that is :func:`matching` counts.
        tasks: the same; the first counts.
    """
    alike = matching(fidelity, tasks)
    best = tasks[0] if tasks and _decides(tasks[0]) else None
    candidates = _candidates(alike, best)
    if not candidates:
        return None
    formats = (alike or tasks[0]).formats
    small = [each for each in candidates if each.bits < _SIXTEEN]
    taken = _smallest([each for each in small if each.keeps == _YES])
    provisional = None if taken is not None else _smallest([c for c in small if _may_keep(c)])
    chosen = taken or provisional
    name = None if chosen is None else formats.label(chosen.kv_spec)
    unsure = any(each.keeps in (_FEW, _LACKS) for each in small)
    return Verdict(
        model=model_name(model),
        headline="Take" if taken is not None
        else "Provisionally" if provisional is not None
        else "Too little is measured to tell" if unsure or not small
        else "Stay with 16 bits",
        taken=name if taken is not None else None,
        provisional=name if taken is None else None,
        reason=_nothing(unsure=unsure or not small) if chosen is None
        else _reason(chosen, formats, best, [each for each in small if each.bits < chosen.bits]),
        rule=f"{_rule(alike, best, small)}{_left_out(fidelity, tasks, alike, best)}",
        ladder=_ladder(candidates, chosen, formats),
    )  # fmt: skip


def _decides(tasks: Measured) -> bool:
    """Whether the mean of any format is known."""
    return any(tasks.mean(spec) is not None for spec in tasks.specs[1:])


def _candidates(alike: Alike | None, tasks: Measured | None) -> list[_Candidate]:
    """Every format but the baselines, large to small."""
    klds = {} if alike is None else {row.kv_spec: row.kld for row in alike.compared}
    means = {} if tasks is None else {spec: tasks.mean(spec) for spec in tasks.specs[1:]}
    bits = {} if tasks is None else {spec: tasks.bits(spec) for spec in means}
    if alike is not None:
        bits |= {row.kv_spec: row.bits_per_element for row in alike.compared}
    if tasks is not None and tasks.baseline in klds:
        means[tasks.baseline] = Mean(0.0, None, 0.0, ())  # loses nothing against itself
    by_kld = any(kld is not None for kld in klds.values())
    found = []
    for spec in bits:
        kld, mean = klds.get(spec), means.get(spec)
        if kld is None and mean is None:
            continue
        lacks = (by_kld and kld is None) or (tasks is not None and mean is None)
        found.append(
            _Candidate(
                kv_spec=spec,
                bits=bits[spec],
                kld=kld,
                mean=mean,
                keeps=_keeps(kld, mean, lacks=lacks),
            )
        )
    return sorted(found, key=lambda each: (-each.bits, order(each.kv_spec, each.bits)))


def _keeps(kld: float | None, mean: Mean | None, *, lacks: bool) -> str:
    """Whether the limits are kept, and if that cannot be told, why."""
    doubt = None if mean is None or mean.doubt is None else _ONE_SIDED * mean.doubt
    if kld is not None and kld > MAX_KLD:
        return _NO
    if mean is not None and (mean.worse or _beyond(mean.difference, doubt)):
        return _NO
    if lacks:
        return _LACKS
    if mean is None or (doubt is not None and mean.difference - doubt >= -MAX_LOSS):
        return _YES
    return _FEW


def _beyond(difference: float, doubt: float | None) -> bool:
    return doubt is not None and difference + doubt < -MAX_LOSS


def _may_keep(each: _Candidate) -> bool:
    """Whether only the number of items keeps a format from being taken."""
    within = each.mean is not None and each.mean.difference >= -MAX_LOSS
    return each.keeps == _FEW and within and each.kld is not None


def _smallest(candidates: Sequence[_Candidate]) -> _Candidate | None:
    return min(candidates, key=lambda each: (each.bits, each.kld or 0), default=None)


def _nothing(*, unsure: bool) -> str:
    if unsure:
        return (
            "No format is shown to keep the limits, and not all are shown to break them: until "
            "more items or formats are measured, 16 bits are safe."
        )
    return "All quantized formats measured here break the limits."


def _reason(
    chosen: _Candidate, formats: Formats, tasks: Measured | None, smaller: Sequence[_Candidate]
) -> str:
    words = [
        f"{sized(formats.size(chosen.bits))} {formats.axis}, so the same memory holds "
        f"{_SIXTEEN / chosen.bits:.1f} times the tokens of 16 bits."
    ]
    if chosen.mean is not None and tasks is not None:
        words.append(
            f"Mean accuracy over {counted(len(tasks.counted), 'data set')} changes by "
            f"{signed(100 * chosen.mean.difference)} {_error(chosen.mean)} points."
        )
    if chosen.kld is not None:
        words.append(f"KL divergence {decimals(chosen.kld, '.2g')} nats.")
    if chosen.keeps == _FEW:
        words.append(
            "It holds the limit of divergence and is not measured to be worse, but too few items "
            "were asked to show that it keeps the limit of accuracy."
        )
    if open_ones := [formats.label(each.kv_spec) for each in smaller if _may_keep(each)]:
        words.append(f"Smaller, but of too few items to tell: {', '.join(open_ones)}.")
    if is_by_layer(chosen.kv_spec):
        words.append("Its formats by layer are a file that kvant eval tune writes for --kv.")
    return " ".join(words).replace("  ", " ")


def _error(mean: Mean | None) -> str:
    return "" if mean is None or mean.stderr is None else f"±{100 * mean.stderr:.2f}"


def _rule(alike: Alike | None, tasks: Measured | None, small: Sequence[_Candidate]) -> str:
    limits = []
    if tasks is not None:
        limits.append(
            f"mean accuracy no more than {100 * MAX_LOSS:g} point below "
            f"{tasks.label(tasks.baseline)} (the lower end of a one-sided 95 % "
            "interval), no data set significantly worse (p < "
            f"{SIGNIFICANT:g}, corrected for their number); dtype {tasks.settings.dtype}"
        )
    if alike is not None and any(each.kld is not None for each in small):
        base = alike.formats.label(alike.settings.baseline)
        limits.append(
            f"a mean KL divergence from {base} of at most {MAX_KLD:g} nats; dtype "
            f"{alike.settings.dtype}"
        )
    settings = (each.settings.weights for each in (alike, tasks) if each is not None)
    known = sum(each.keeps != _LACKS for each in small)
    return (
        f"The rule: the smallest of {counted(known, 'format')} below 16 bits with "
        f"{', and '.join(limits)}. Weights: {next(settings)}."
    )


def _left_out(
    fidelity: Sequence[Alike],
    tasks: Sequence[Measured],
    alike: Alike | None,
    best: Measured | None,
) -> str:
    """What the rule did not consider."""
    parts = []
    if best is not None:
        left = [task for task in best.tasks if task not in best.counted]
        for what, some in (
            ("at chance", [task for task in left if best.at_chance(task)]),
            ("with short prompts", [task for task in left if not best.at_chance(task)]),
        ):
            if some:
                parts.append(f"data sets {what} ({', '.join(some)})")
        if best.unlike:
            parts.append(f"other items, or no baseline ({', '.join(best.unlike)})")
    if names := _names(each for each in tasks if each is not best):
        parts.append(f"data sets under other settings ({', '.join(names)})")
    if names := _names(each for each in fidelity if each is not alike):
        parts.append(f"fidelity on other texts, lengths or weights ({counted(len(names), 'file')})")
    return f" Not considered: {'; '.join(parts)}." if parts else ""


def _names(groups: Iterable[Alike | Measured]) -> list[str]:
    """Of their files."""
    return sorted({source.name for each in groups for source in each.sources})


def _ladder(candidates: Sequence[_Candidate], chosen: _Candidate | None, formats: Formats) -> Table:
    """What is on the front by divergence, or by accuracy without that, and what lacks the
    measure; from large to small."""
    by_kld = any(each.kld is not None for each in candidates)
    by_mean = any(each.mean is not None for each in candidates)

    def loss(each: _Candidate) -> float | None:
        if by_kld:
            return each.kld
        return None if each.mean is None else -each.mean.difference

    lacking = [each for each in candidates if loss(each) is None]
    known = [(each, lost) for each in candidates if (lost := loss(each)) is not None]
    full = [pair for pair in known if pair[0].mean is not None or not by_mean]
    shown = [each for each in candidates if each is chosen or each in lacking]
    for pairs in (known, full):
        shown += [pairs[i][0] for i in front([(each.bits, lost) for each, lost in pairs])]
    shown = [each for each in candidates if each in shown]
    measure = "KL divergence" if by_kld else "mean accuracy"
    note = f"Left out: formats that another one beats in both size and {measure}"
    if len(full) < len(known):
        note += "; one that is measured in full, only if the other one is"
    columns = [True, True, True, True, by_kld, by_mean]
    head = ["format", "keeps the limits", formats.unit, "tokens in the same memory",
            "KL divergence", "mean accuracy"]  # fmt: skip

    def cells(each: _Candidate) -> list[Cell]:
        tone = "faint" if each.keeps == _NO else ""
        tone = "taken" if each is chosen and each.keeps == _YES else tone
        mean = None if each.mean is None else 100 * each.mean.difference
        all_cells = [
            Cell(formats.label(each.kv_spec), describe(each.kv_spec), tone),
            Cell(each.keeps, tone=tone),
            Cell(sized(formats.size(each.bits)), tone=tone),
            Cell(times(_SIXTEEN / each.bits), tone=tone),
            Cell(decimals(each.kld, "#.2g"), tone=tone),
            Cell(signed(mean), _error(each.mean), tone),
        ]
        return [cell for cell, wanted in zip(all_cells, columns, strict=True) if wanted]

    return Table(
        caption="By memory: of the rows that keep the limits, take the first that fits yours",
        head=[word for word, wanted in zip(head, columns, strict=True) if wanted],
        rows=[cells(each) for each in shown],
        notes=[f"{note}.", formats.note],
        words=2,
    )
