"""Which format to take: the smallest one that keeps within stated limits, and the formats that
no other one beats in size and in loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvant.formats.auto import BOUND
from kvant.report.charts import front
from kvant.report.fidelity import Alike
from kvant.report.layout import Cell, Table, count, counted, decimals, signed, times
from kvant.report.names import describe, is_16_bit, is_by_layer, label_of, model_name, order
from kvant.report.tasks import SIGNIFICANT, Mean, Measured

__all__ = ["MAX_KLD", "MAX_LOSS", "Verdict", "judge"]

MAX_LOSS = 0.01
"""Mean accuracy that a format may lose, a share: one percentage point."""

MAX_KLD = BOUND
"""Mean KL divergence, nats, that a format may have: what ``kv="auto"`` accepts."""

_ONE_SIDED = 1.645  # standard errors: the lower end of a one-sided interval of 95 %
_SIXTEEN = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A format and what was measured of it."""

    kv_spec: str
    label: str
    size: float
    kld: float | None
    mean: Mean | None

    @property
    def keeps(self) -> bool:
        """Whether it is within both limits, as far as each was measured."""
        if self.kld is not None and self.kld > MAX_KLD:
            return False
        if self.mean is None:
            return self.kld is not None
        if self.mean.doubt is None or self.mean.worse:
            return False
        return self.mean.difference - _ONE_SIDED * self.mean.doubt >= -MAX_LOSS


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """For one model.

    model    its name
    taken    the name of the format to take, None if no quantized one keeps within the limits
    reason   what it costs and saves, a sentence or two
    rule     how it was chosen
    ladder   the formats that no other one beats, from large to small
    """

    model: str
    taken: str | None
    reason: str
    rule: str
    ladder: Table


def judge(model: str, fidelity: Alike | None, tasks: Measured | None) -> Verdict | None:
    """Decide; None without anything to decide from."""
    candidates = _candidates(fidelity, tasks)
    if not candidates:
        return None
    by_tasks = any(each.mean is not None for each in candidates)
    by_kld = any(each.kld is not None for each in candidates)
    judged = [
        each
        for each in candidates
        if (each.mean is not None or not by_tasks) and not is_16_bit(each.kv_spec)
    ]
    plain = _sixteen(fidelity, tasks)
    taken = min(
        (each for each in judged if each.keeps and (plain is None or each.size < plain)),
        key=lambda each: (each.size, each.kld or 0),
        default=None,
    )
    return Verdict(
        model=model_name(model),
        taken=None if taken is None else taken.label,
        reason=_reason(taken, plain, tasks),
        rule=_rule(tasks if by_tasks else None, by_kld=by_kld, judged=len(judged)),
        ladder=_ladder(candidates, taken, plain),
    )


def _candidates(fidelity: Alike | None, tasks: Measured | None) -> list[_Candidate]:
    """Every format but the baselines."""
    klds = {} if fidelity is None else {row.kv_spec: row for row in fidelity.compared}
    means = {} if tasks is None else {spec: tasks.mean(spec) for spec in tasks.specs[1:]}
    found = []
    for spec in dict.fromkeys((*klds, *means)):
        row = klds.get(spec)
        sized = row if row is not None or tasks is None else tasks.any_row(spec)
        assert sized is not None
        kld, mean = None if row is None else row.kld, means.get(spec)
        if kld is not None or mean is not None:
            found.append(
                _Candidate(
                    kv_spec=spec,
                    label=label_of(spec, sized.bits_per_element),
                    size=sized.bytes_per_token,
                    kld=kld,
                    mean=mean,
                )
            )
    return sorted(found, key=lambda each: (-each.size, order(each.kv_spec, each.size)))


def _sixteen(fidelity: Alike | None, tasks: Measured | None) -> float | None:
    """Bytes per token of a 16-bit cache, from a baseline, which stores plain numbers."""
    for base in (
        None if tasks is None else tasks.any_row(tasks.baseline),
        None if fidelity is None else fidelity.baseline,
    ):
        if base is not None and order(base.kv_spec, 0)[0] == 0:
            return _SIXTEEN * base.bytes_per_token / base.bits_per_element
    return None


def _reason(taken: _Candidate | None, plain: float | None, tasks: Measured | None) -> str:
    if taken is None:
        return (
            "No quantized format measured here is shown to keep within the limits: stay with 16 "
            "bits, or measure more items."
        )
    saved = ""
    if plain is not None:
        saved = f", so the same memory holds {plain / taken.size:.1f} times the tokens of 16 bits"
    words = [f"{count(taken.size)} bytes per token{saved}."]
    if taken.mean is not None and tasks is not None:
        error = "" if taken.mean.stderr is None else f" ± {100 * taken.mean.stderr:.2f}"
        words.append(
            f"Mean accuracy over {counted(len(tasks.counted), 'data set')} changes by "
            f"{signed(100 * taken.mean.difference)}{error} points."
        )
    if taken.kld is not None:
        words.append(f"KL divergence {decimals(taken.kld, '.2g')} nats.")
    if is_by_layer(taken.kv_spec):
        words.append("Its formats by layer are a file that kvant eval tune writes for --kv.")
    return " ".join(words)


def _rule(tasks: Measured | None, *, by_kld: bool, judged: int) -> str:
    limits = []
    if tasks is not None:
        base = label_of(tasks.baseline)
        limits.append(
            f"mean accuracy no more than {100 * MAX_LOSS:g} point below {base} (the lower end of a "
            "one-sided 95 % interval), no data set significantly worse (p < "
            f"{SIGNIFICANT:g}, corrected for their number)"
        )
    if by_kld:
        limits.append(f"a mean KL divergence of at most {MAX_KLD:g} nats")
    known = counted(judged, "format")
    return f"The rule: the smallest of {known} measured with {' and '.join(limits)}."


def _ladder(
    candidates: Sequence[_Candidate], taken: _Candidate | None, plain: float | None
) -> Table:
    """What is on the front by divergence, or by accuracy without that, from large to small."""
    losses = [(each, each.kld) for each in candidates]
    if all(kld is None for _, kld in losses):
        losses = [(each, -each.mean.difference if each.mean else None) for each in candidates]
    known = [(each, loss) for each, loss in losses if loss is not None]
    best = [known[i][0] for i in front([(each.size, loss) for each, loss in known])]
    shown = [each for each in candidates if each in best or each is taken]
    head = ["format", "bytes/token", "tokens in the same memory", "KL divergence", "mean accuracy"]
    columns = [True, True, plain is not None, any(c.kld is not None for c in shown),
               any(c.mean is not None for c in shown)]  # fmt: skip

    def cells(each: _Candidate) -> list[Cell]:
        tone = "taken" if each is taken else ""
        mean = each.mean
        error = "" if mean is None or mean.stderr is None else f"±{100 * mean.stderr:.2f}"
        all_cells = [
            Cell(each.label, describe(each.kv_spec), tone),
            Cell(count(each.size), tone=tone),
            Cell(times(plain / each.size) if plain is not None else "", tone=tone),
            Cell(decimals(each.kld, "#.2g"), tone=tone),
            Cell(signed(None if mean is None else 100 * mean.difference), error, tone),
        ]
        return [cell for cell, wanted in zip(all_cells, columns, strict=True) if wanted]

    return Table(
        caption="By memory: take the first row that fits yours",
        head=[word for word, wanted in zip(head, columns, strict=True) if wanted],
        rows=[cells(each) for each in shown],
        notes=["Formats that no other measured one beats in both size and loss, large to small."],
    )
