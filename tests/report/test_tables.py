"""What is measured alike is put together, and what tables say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvant.report import Report, make_report, read_results
from kvant.report.charts import front
from kvant.report.fidelity import fidelity_groups
from kvant.report.layout import Table, decimals, signed
from kvant.report.names import describe, is_16_bit, label_of, model_name, order
from kvant.report.speed import growth_sections, throughput_section
from kvant.report.stored import Source
from kvant.report.tasks import accuracy_section, length_section, task_groups
from tests.report.results import EVERY, K4V4, fidelity, latency, tasks, throughput, write

Read = Callable[..., tuple[Source, ...]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return lambda **results: read_results([write(tmp_path, **results)]).sources


def report_of(folder: Path, **results: Any) -> Report:
    return make_report(read_results([write(folder, **results)]))


def texts(table: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in table.rows]


def test_fidelity_is_merged_by_format_and_the_newest_row_holds(read: Read) -> None:
    sources = read(
        old=fidelity({"f32": 0.0, "int8": 0.5, "int4": 0.6}, day="2026-01-01"),
        new=fidelity({"f32": 0.0, "int8": 0.1, K4V4: 0.2}, day="2026-01-02"),
    )
    (group,) = fidelity_groups(sources)
    assert {spec: row.kld for spec, row in group.rows.items()} == {
        "f32": 0.0, "int8": 0.1, "int4": 0.6, K4V4: 0.2
    }  # fmt: skip
    assert [source.name for source in group.sources] == ["old.json", "new.json"]


@pytest.mark.parametrize(
    "other",
    (
        {"model": "another"},
        {"dtype": "bfloat16"},
        {"text": {"source": "some/text.txt", "sha256": "cd"}},
        {"command": "kvant eval fidelity model --weights int8"},
        {"command": "kvant eval fidelity model --weights=int8"},
        {"weight_dtype": "int8"},
        {"ppl": 21.0},
    ),
)
def test_other_settings_are_not_merged(read: Read, other: dict[str, Any]) -> None:
    klds = {"f32": 0.0, "int8": 0.1}
    assert len(fidelity_groups(read(a=fidelity(klds), b=fidelity(klds, **other)))) == 2


def test_baselines_differ(read: Read) -> None:
    sources = read(a=fidelity({"f32": 0.0, "int8": 0.1}), b=fidelity({"bf16": 0.0, "int8": 0.1}))
    assert {group.baseline.kv_spec for group in fidelity_groups(sources)} == {"f32", "bf16"}


def test_the_accuracy_table_has_the_shape_of_the_seeds(read: Read) -> None:
    sources = read(tasks=EVERY["tasks"])
    (group,) = task_groups(sources)
    table = accuracy_section(group, key="k", title="t").tables[0]
    assert list(table.head) == ["data set", "items", "bf16", "int8", "int4", "k4v4"]
    mmlu, piqa, mean, change = texts(table)
    assert piqa == ["piqa", "400", "68.00", "68.00", "60.00", "67.90"]
    assert table.rows[1][0].detail == "acc, 5-shot, guessing 25 %"
    assert table.rows[1][1].detail == "of 1,200" and table.rows[1][2].detail == "±1.00"
    # mmlu's baseline, 0.26 ± 0.01, is no better than guessing: grey, explained, not in the mean
    assert mmlu[0] == "mmlu †" and all(cell.tone == "faint" for cell in table.rows[0])
    assert any("mmlu says nothing" in note for note in table.notes)
    assert mean == ["mean", "400", "68.00", "68.00", "60.00", "67.90"]
    assert change[2:] == ["–", "0.00", "−8.00", "−0.10"]  # noqa: RUF001


def test_without_chance_a_score_near_zero_says_nothing(read: Read) -> None:
    found = tasks({"gsm8k": {"bf16": 0.015, "int8": 0.01}, "lambada": {"bf16": 0.4, "int8": 0.4}},
                  chance=None)  # fmt: skip
    (group,) = task_groups(read(tasks=found))
    assert group.at_chance("gsm8k") and not group.at_chance("lambada")


def test_significant_differences_are_marked(read: Read) -> None:
    scores = {"piqa": {"bf16": 0.7, "int8": 0.6, "int4": 0.8}}
    for p_value, marks in (
        (0.04, ["70.00", "60.00*", "80.00*"]),
        (0.06, ["70.00", "60.00", "80.00"]),
    ):
        (group,) = task_groups(read(tasks=tasks(scores, p_value=p_value)))
        table = accuracy_section(group, key="k", title="t").tables[0]
        assert texts(table)[0][2:] == marks
    assert [cell.tone for cell in table.rows[0][2:]] == ["", "", ""]


def test_a_data_set_is_of_the_newest_file_and_of_older_ones_with_the_same_items(read: Read) -> None:
    scores = {"piqa": {"bf16": 0.7, "int8": 0.6}}
    old = tasks({"piqa": {"bf16": 0.7, "int4": 0.5}}, day="2026-01-01")
    other = tasks({"piqa": {"bf16": 0.1, K4V4: 0.1}}, day="2026-01-01")
    for row in other["results"]:
        row["items_sha256"] = "other items"
    (group,) = task_groups(read(a=old, b=other, c=tasks(scores, day="2026-01-02")))
    assert group.specs == ("bf16", "int8", "int4")
    assert [source.name for source in group.sources] == ["a.json", "c.json"]


def test_scores_by_length(read: Read) -> None:
    found = tasks({"needle": {"bf16": 0.9, "int8": 0.8}})
    for row, shares in zip(found["results"], ((1.0, 0.8), (1.0, 0.6)), strict=True):
        row["lengths"] = dict(zip(("1024", "8192"), shares, strict=True))
    (group,) = task_groups(read(tasks=found))
    section = length_section(group, key="k", title="t")
    assert section is not None
    assert texts(section.tables[0]) == [["1,024", "100 %", "100 %"], ["8,192", "80 %", "60 %"]]
    (group,) = task_groups(read(tasks=EVERY["tasks"]))
    assert length_section(group, key="k", title="t") is None


def test_throughput_is_compared_with_16_bits_wherever_they_stand(read: Read) -> None:
    section = throughput_section(read(throughput=throughput({"int8": 3.0, "bf16": 2.0})), "model")
    assert section is not None
    (table,) = section.tables
    assert table.head[2] == "against bf16" and "b.csv" in table.caption
    assert [row[2].text.split()[0] for row in table.rows] == ["1.50", "1.00"]


def test_growth_is_of_one_axis_at_a_time_and_of_the_newest_file(read: Read) -> None:
    sources = read(
        a=latency((512, 2048), (1,), day="2026-01-01"),
        b=latency((512, 2048), (1,), day="2026-01-03"),
        c=latency((512,), (1, 4)),
    )
    by_context, by_batch = growth_sections(sources, "model")
    assert [source.name for source in by_context.sources] == ["b.json"]
    assert [source.name for source in by_batch.sources] == ["c.json"]
    assert [row[0] for row in texts(by_context.tables[0])] == ["512", "2,048"]
    assert len(by_context.charts) == 3


def test_files_of_which_nothing_is_shown_are_named(tmp_path: Path) -> None:
    report = report_of(
        tmp_path,
        old=fidelity({"f32": 0.0, "int8": 0.1}, day="2026-01-01"),
        new=fidelity({"f32": 0.0, "int8": 0.1}, day="2026-01-02"),
        other={"results": []},
    )
    assert (report.unused, report.others) == (("old.json",), ("other.json",))
    assert [source.name for source in report.shown] == ["new.json"]


def test_sections_of_two_models_have_keys_of_their_own(tmp_path: Path) -> None:
    report = report_of(
        tmp_path, **EVERY, again=EVERY["fidelity"] | {"model": "/home/someone/other.gguf"},
        faster=EVERY["throughput"] | {"model": "/home/someone/other.gguf"},
    )  # fmt: skip
    keys = [section.key for section in report.sections] + [chart.name for chart in report.charts]
    assert len(set(keys)) == len(keys)
    assert "other.gguf" in report.models and "someone" not in report.title
    assert any(section.title == "Fidelity: other.gguf" for section in report.sections)


def test_names() -> None:
    assert label_of(K4V4) == "k4v4" and label_of(f"{K4V4};0=int8", 4.5) == "by layer, 4.50 bits"
    assert label_of("int9z") == "int9z" and len(label_of("x" * 99)) == 40
    assert label_of("somewhere/policy.json") == "somewhere/policy.json"  # is not opened
    assert is_16_bit("bf16") and not is_16_bit("f32") and not is_16_bit("int9z")
    assert "keys 4 bits" in describe(K4V4) and "not known" in describe("int9z")
    specs = ["int9z", f"{K4V4};0=int8", K4V4, "int8", "bf16"]
    assert sorted(specs, key=lambda spec: order(spec, 1)) == specs[::-1]
    assert model_name("org/model") == "org/model" and model_name("/a/b.gguf") == "b.gguf"


def test_figures() -> None:
    assert [decimals(value, "#.2g") for value in (None, 0, 1.6e-05, 0.1, 12.0)] == [
        "–", "0", "0.000016", "0.10", "12",  # noqa: RUF001
    ]  # fmt: skip
    assert [signed(value) for value in (None, -0.001, 1.5, -1.5)] == [
        "–", "0.00", "+1.50", "−1.50",  # noqa: RUF001
    ]  # fmt: skip


def test_the_front_is_what_no_other_point_beats() -> None:
    points = [(3, 1), (1, 3), (2, 2), (2, 2.5), (3, 2), (4, 1)]
    assert [points[index] for index in front(points)] == [(1, 3), (2, 2), (3, 1)]
    assert front([]) == []
