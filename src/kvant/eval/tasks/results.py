"""What answers are worth: means with standard errors, and formats against each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from kvant.eval.metrics import number
from kvant.eval.runner import CONTEXT
from kvant.eval.tasks.exam import Exam, Metrics
from kvant.formats import KVShape, KVSpec

__all__ = ["Comparison", "Score", "compare", "mcnemar", "score", "task_row"]


@dataclass(frozen=True, slots=True)
class Score:
    """The mean of a metric over questions and its standard error; a perplexity is
    ``exp(-mean)`` of log-likelihoods, its error that of the first order."""

    value: float
    stderr: float

    def as_json(self) -> dict[str, float | None]:
        """For JSON."""
        return {"value": number(self.value), "stderr": number(self.stderr)}


def score(metric: str, values: Sequence[float]) -> Score:
    """The score of the values of all questions; the standard error is NaN of a single one."""
    mean = math.fsum(values) / len(values)
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    stderr = spread / math.sqrt(len(values))
    if metric == "perplexity":
        perplexity = math.exp(-mean)
        return Score(perplexity, perplexity * stderr)
    return Score(mean, stderr)


def task_row(
    exam: Exam, spec: KVSpec, shape: KVShape, answers: Sequence[Metrics]
) -> dict[str, Any]:
    """One format and benchmark, for JSON; docs/evaluation.md says what each key means."""
    metric = exam.bench.metric
    scores = {name: score(name, [each[name] for each in answers]) for name in answers[0]}
    lengths: dict[str, float] = {}
    for length in sorted({each for each in exam.lengths() if each is not None}):
        right = [a[metric] for a, n in zip(answers, exam.lengths(), strict=True) if n == length]
        lengths[str(length)] = score(metric, right).value
    return {
        "kv_spec": str(spec),
        "kv": spec.label,
        "bits_per_element": spec.bits_per_element(shape, CONTEXT),
        "bytes_per_token": spec.bytes_per_token(shape),
        "task": exam.name,
        "num_fewshot": exam.bench.shots,
        "prompt_tokens": round(exam.prompt_tokens, 1),
        "metric": metric,
        **scores[metric].as_json(),
        "chance": exam.bench.chance,
        "items": len(answers),
        "of": exam.of,
        "outcomes": "".join(str(int(each[metric])) for each in answers),
        "items_sha256": exam.digest,
        "metrics": {name: each.as_json() for name, each in scores.items()},
        "lengths": lengths or None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A format against the baseline on the same questions.

    difference  of the scores, and stderr: its standard error, of paired questions
    gained      questions that only the format answers right; lost: only the baseline
    p_value     how often chance alone gives as uneven a split, two-sided (McNemar's test, exact)
    """

    kv_spec: str
    kv: str
    task: str
    baseline: str
    difference: float
    stderr: float | None
    gained: int
    lost: int
    p_value: float
    test: str = "McNemar, exact"


def compare(rows: Sequence[dict[str, Any]]) -> list[Comparison]:
    """Each row against the first of its benchmark; metrics that are right or wrong."""
    first: dict[str, dict[str, Any]] = {}
    found = []
    for row in rows:
        base = first.setdefault(row["task"], row)
        if base is not row:
            found.append(_pair(row, base))
    return found


def _pair(row: dict[str, Any], base: dict[str, Any]) -> Comparison:
    pairs = list(zip(row["outcomes"], base["outcomes"], strict=True))
    gained, lost = pairs.count(("1", "0")), pairs.count(("0", "1"))
    count, net = len(pairs), gained - lost
    spread = math.sqrt(((gained + lost) / count - (net / count) ** 2) / max(count - 1, 1))
    return Comparison(
        kv_spec=row["kv_spec"],
        kv=row["kv"],
        task=row["task"],
        baseline=base["kv_spec"],
        difference=net / count,
        stderr=number(spread) if count > 1 else None,
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact test: the two-sided probability that a fair coin splits ``gained + lost``
    at least as unevenly."""
    count = gained + lost
    tail, ways = 0, 1  # of choosing k among all that differ
    for k in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (count - k) // (k + 1)
    return min(1.0, float(Fraction(2 * tail, 2**count)))
