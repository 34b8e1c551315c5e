"""Which format is to be taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvant.report import make_report, read_results
from kvant.report.verdict import MAX_KLD, MAX_LOSS, Verdict
from tests.report.results import K4V4, K8V4, fidelity, latency, tasks, write

Judge = Callable[..., Verdict]


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    def judge(**results: Any) -> Verdict:
        (verdict,) = make_report(read_results([write(tmp_path, **results)])).verdicts
        return verdict

    return judge


def test_the_smallest_within_the_limit_of_divergence(judge: Judge) -> None:
    klds = {"f32": 0.0, "int8": 0.0001, "int4": 0.1, K4V4: MAX_KLD}
    verdict = judge(fidelity=fidelity(klds))
    assert verdict.taken == "k4v4"
    assert "3.5 times the tokens of 16 bits" in verdict.reason and f"{MAX_KLD:g}" in verdict.rule
    assert judge(fidelity=fidelity(klds | {K4V4: 1.01 * MAX_KLD})).taken == "int8"


def test_nothing_within_the_limits(judge: Judge) -> None:
    verdict = judge(fidelity=fidelity({"f32": 0.0, "int8": 0.1}))
    assert verdict.taken is None and verdict.headline == "Stay with 16 bits"


def test_16_bits_are_no_answer(judge: Judge) -> None:
    assert judge(fidelity=fidelity({"f32": 0.0, "bf16": 0.0001})).taken is None


@pytest.mark.parametrize(
    ("loss", "stderr", "p_value", "taken"),
    (
        (0.0, 0.001, 1.0, "k4v4"),
        (0.5 * MAX_LOSS, 0.001, 1.0, "k4v4"),
        (0.5 * MAX_LOSS, 0.01, 1.0, None),  # too few items to be sure
        (1.1 * MAX_LOSS, 0.001, 1.0, None),
        (0.1 * MAX_LOSS, 0.001, 0.001, None),  # small, but there
        (-0.1 * MAX_LOSS, 0.001, 0.001, "k4v4"),  # better is not worse
    ),
)
def test_accuracy_must_be_shown_to_be_kept(
    judge: Judge, loss: float, stderr: float, p_value: float, taken: str | None
) -> None:
    scores = {"piqa": {"bf16": 0.7, K4V4: 0.7 - loss}}
    assert judge(tasks=tasks(scores, stderr=stderr, p_value=p_value)).taken == taken


def test_few_items_without_a_difference_prove_nothing(judge: Judge) -> None:
    found = tasks({"passkey": {"bf16": 1.0, K4V4: 1.0}}, stderr=0.0)
    assert judge(tasks=found).taken == "k4v4"
    for row in found["results"]:
        row["items"] = 20
    assert judge(tasks=found).taken is None


def test_one_of_many_data_sets_may_differ_by_luck(judge: Judge) -> None:
    scores = {f"set {n}": {"bf16": 0.7, K4V4: 0.699} for n in range(10)}
    assert judge(tasks=tasks(scores, p_value=0.02)).taken == "k4v4"
    assert judge(tasks=tasks(scores, p_value=0.002)).taken is None


def test_both_measures_must_hold(judge: Judge) -> None:
    scores = {"piqa": {"bf16": 0.7, "int8": 0.7, K4V4: 0.7}}
    klds = {"f32": 0.0, "int8": 0.0001, "int4": 0.001, K4V4: 0.1}
    verdict = judge(tasks=tasks(scores), fidelity=fidelity(klds))
    assert verdict.taken == "int8"  # int4 has no accuracy, k4v4 too much divergence
    assert "2 formats below 16 bits" in verdict.rule


def test_a_measure_that_is_missing_is_not_passed(judge: Judge) -> None:
    scores = {"piqa": {"bf16": 0.7, "int8": 0.7, K4V4: 0.7}}
    verdict = judge(
        tasks=tasks(scores), fidelity=fidelity({"f32": 0.0, "int8": 0.0001, K8V4: 0.0002})
    )
    assert verdict.taken == "int8"  # k4v4 has no divergence, k8v4 no accuracy
    rows = {row[0].text: [row[n].text for n in (4, 5, 1)] for row in verdict.ladder.rows}
    assert rows == {
        "int8": ["0.00010", "0.00", "yes"],
        "k8v4": ["0.00020", "–", "not all measured"],  # noqa: RUF001
        "k4v4": ["–", "0.00", "not all measured"],  # noqa: RUF001
    }


def test_a_format_without_accuracy_beats_none_that_has_it(judge: Judge) -> None:
    scores = {"piqa": {"bf16": 0.7, "int8": 0.7}}
    klds = {"f32": 0.0, "int8": 0.003, K8V4: 0.002, K4V4: 0.004}
    rows = judge(tasks=tasks(scores), fidelity=fidelity(klds)).ladder.rows
    assert [row[0].text for row in rows] == ["int8", "k8v4", "k4v4"]


def test_the_baseline_of_accuracy_lacks_no_accuracy(judge: Judge) -> None:
    scores = {"piqa": {"bf16": 0.7, "int8": 0.7}}
    klds = {"f32": 0.0, "bf16": 0.00001, "int8": 0.0001}
    rows = judge(tasks=tasks(scores), fidelity=fidelity(klds)).ladder.rows
    assert [row[1].text for row in rows] == ["yes", "yes"]


def test_accuracy_and_divergence_are_of_the_same_weights(judge: Judge) -> None:
    scores, klds = {"piqa": {"bf16": 0.7, "int8": 0.7}}, {"f32": 0.0, "int8": 0.1}
    more = {"f32": 0.0, "int8": 0.0001, "int4": 0.0001}
    one, other = fidelity(klds, weight_dtype="auto"), fidelity(more, weight_dtype="int8")
    verdict = judge(tasks=tasks(scores), one=one, other=other)
    assert verdict.headline == "Stay with 16 bits" and "1 file" in verdict.rule
    assert judge(tasks=tasks(scores, weight_dtype="int8"), one=one, other=other).taken == "int8"
    verdict = judge(tasks=tasks(scores, weight_dtype="int4"), one=one, other=other)
    assert verdict.taken == "int8" and "KL" not in verdict.rule and "2 files" in verdict.rule


def test_the_rule_names_baselines_and_types_and_what_it_leaves_out(judge: Judge) -> None:
    scores = {"mmlu": {"bf16": 0.25, "int8": 0.1}, "piqa": {"bf16": 0.7, "int8": 0.7}}
    chat = tasks({"piqa": {"bf16": 0.7, "int8": 0.1}}, chat_template=True)
    klds = {"f32": 0.0, "int8": 0.0001}
    rule = judge(tasks=tasks(scores), chat=chat, fidelity=fidelity(klds)).rule
    for words in ("below bf16", "dtype bfloat16", "from f32", "dtype float32", "Weights: auto",
                  "at chance (mmlu)", "other settings (chat.json)"):  # fmt: skip
        assert words in rule


def test_too_few_items_are_not_a_loss(judge: Judge) -> None:
    scores = {"piqa": {"bf16": 0.7, "int8": 0.7, K4V4: 0.695, "int4": 0.68}}
    klds = {"f32": 0.0, "int8": 0.0001, K4V4: 0.005, "int4": 0.006}
    verdict = judge(tasks=tasks(scores, stderr=0.02), fidelity=fidelity(klds))
    assert (verdict.headline, verdict.taken, verdict.provisional) == ("Provisionally", None, "k4v4")
    assert "too few items were asked" in verdict.reason
    assert {row[1].text for row in verdict.ladder.rows} == {"too few items"}
    assert "taken" not in {row[0].tone for row in verdict.ladder.rows}
    without = judge(tasks=tasks(scores, stderr=0.02), fidelity=fidelity({"f32": 0.0}))
    assert without.headline == "Too little is measured to tell" and without.provisional is None
    worse = judge(tasks=tasks({"piqa": {"bf16": 0.7, "int8": 0.6}}), fidelity=fidelity({"f32": 0}))
    assert worse.headline == "Stay with 16 bits"


def test_sizes_without_a_format_that_tells_how_many_numbers_a_token_has(judge: Judge) -> None:
    verdict = judge(fidelity=fidelity({K8V4: 0.0, K4V4: 0.001}))
    assert verdict.ladder.head[2] == "bits/number" and "4.62 bits" in verdict.reason


def test_data_sets_at_chance_decide_nothing(judge: Judge) -> None:
    scores = {"mmlu": {"bf16": 0.25, K4V4: 0.1}, "piqa": {"bf16": 0.7, K4V4: 0.7}}
    verdict = judge(tasks=tasks(scores))
    assert verdict.taken == "k4v4" and "over 1 data set " in verdict.reason


def test_the_ladder_has_what_no_other_format_beats(judge: Judge) -> None:
    klds = {"f32": 0.0, "int8": 0.0001, K8V4: 0.006, "int4": 0.1, K4V4: 0.005}
    ladder = judge(fidelity=fidelity(klds)).ladder  # k8v4: larger and worse than k4v4
    assert [row[0].text for row in ladder.rows] == ["int8", "k4v4", "int4"]
    assert [row[0].tone for row in ladder.rows] == ["", "taken", "faint"]
    assert [row[1].text for row in ladder.rows] == ["yes", "yes", "no"]
    assert [row[2].text for row in ladder.rows] == ["12,240", "6,653", "6,480"]
    assert "that keep the limits" in ladder.caption and "4,096 tokens" in ladder.notes[-1]
    assert ladder.rows[0][3].text.startswith("1.88")


def test_speed_alone_has_no_verdict(tmp_path: Path) -> None:
    report = make_report(read_results([write(tmp_path, latency=latency((64, 128), (1,)))]))
    assert report.verdicts == () and report.sections
