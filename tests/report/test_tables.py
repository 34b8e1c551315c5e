"""What is measured alike is put together, and what tables say of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvant.report import Report, make_report, read_results, render_markdown
from kvant.report import fidelity as groups
from kvant.report import tasks as groups_of_tasks
from kvant.report.charts import front
from kvant.report.fidelity import Alike
from kvant.report.layout import Table, decimals, signed
from kvant.report.names import describe, formats_of, is_16_bit, label_of, model_name, order
from kvant.report.speed import growth_sections, throughput_section
from kvant.report.stored import Source
from kvant.report.tasks import Measured, accuracy_section, length_section
from tests.report.results import EVERY, K4V4, fidelity, latency, tasks, throughput, write

Read = Callable[..., tuple[Source, ...]]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return lambda **results: read_results([write(tmp_path, **results)]).sources


def fidelity_groups(sources: tuple[Source, ...]) -> list[Alike]:
    return groups.fidelity_groups(sources, formats_of(sources, "model"))


def task_groups(sources: tuple[Source, ...]) -> list[Measured]:
    return groups_of_tasks.task_groups(sources, formats_of(sources, "model"))


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


@pytest.mark.parametrize("limit", (None, 400, 0.5, "400", {"mmlu": 400}, [1]))
def test_a_limit_of_any_shape_neither_stops_nor_splits(read: Read, limit: object) -> None:
    one = tasks({"piqa": {"bf16": 0.7, "int8": 0.6}}, limit=limit)
    (group,) = task_groups(read(a=one, b=tasks({"mmlu": {"bf16": 0.7, "int8": 0.6}})))
    assert group.tasks == ("piqa", "mmlu")


def test_of_a_data_set_the_rows_of_most_items_count(read: Read) -> None:
    many = tasks({"piqa": {"bf16": 0.7, "int8": 0.6}}, day="2026-01-01")
    few = tasks({"piqa": {"bf16": 0.8, "int8": 0.8, "int4": 0.8}}, day="2026-01-02")
    alone = tasks({"piqa": {"bf16": 0.9}}, day="2026-01-02")
    for found, items in ((few, 10), (alone, 1000)):
        for row in found["results"]:
            row |= {"items": items, "items_sha256": f"{items} items"}
    (group,) = task_groups(read(many=many, few=few, alone=alone))
    assert {spec: group.rows["piqa", spec].value for spec in group.specs} == {
        "bf16": 0.7, "int8": 0.6
    }  # fmt: skip
    assert group.unlike == ("int4 on piqa",)
    assert [source.name for source in group.sources] == ["many.json"]


def test_luck_counts_only_comparisons_that_could_be_marked(read: Read) -> None:
    def note(found: dict[str, Any]) -> str:
        (group,) = task_groups(read(tasks=found))
        return accuracy_section(group, key="k", title="t").tables[0].notes[0]

    found = tasks({f"set {n}": {"bf16": 0.7, "int8": 0.7} for n in range(45)})
    for number, pair in enumerate(found["comparisons"]):
        pair |= {"gained": 3, "lost": 3 if number < 40 else 2}
    assert "Of 40 comparisons" in note(found) and "at most about 2 would" in note(found)
    for pair in found["comparisons"]:
        pair["lost"] = 2
    assert "luck" not in note(found)


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
    sources = read(throughput=throughput({"int8": 3.0, "bf16": 2.0}))
    section = throughput_section(sources, formats_of(sources, "model"))
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
    by_context, by_batch = growth_sections(sources, formats_of(sources, "model"))
    assert [source.name for source in by_context.sources] == ["b.json"]
    assert [source.name for source in by_batch.sources] == ["c.json"]
    assert [row[0] for row in texts(by_context.tables[0])] == ["512", "2,048"]
    assert len(by_context.charts) == 3


def test_two_formats_by_layer_are_two(read: Read) -> None:
    found = latency((512, 2048), (1,))
    layered = (f"{K4V4};0=int8", f"{K4V4};1=int8")
    for row in found["results"]:
        row["kv_spec"] = layered[row["kv_spec"] == "int8"]
    sources = read(a=found, b=throughput({"int8": 3.0, "bf16": 2.0}))
    labels = ["by layer", "by layer (2)"]
    (section,) = growth_sections(sources, formats_of(sources, "model"))
    assert list(section.tables[0].head[1:]) == labels
    assert all(label in section.charts[0].alt for label in labels)


def test_a_single_static_batch_is_a_table(tmp_path: Path) -> None:
    report = report_of(tmp_path, a=latency((512,), (1,)), b=latency((64, 128), (2,)))
    assert not report.unused
    (single,) = [each for each in report.sections if each.key == "static-batch"]
    assert texts(single.tables[0])[0][:3] == ["bf16", "512", "1"] and not single.charts
    assert len(single.tables[0].rows) == 2


def test_sections_of_the_same_axis_have_titles_of_their_own(read: Read) -> None:
    sources = read(a=latency((64, 128), (1,)), b=latency((64, 128), (2,)))
    assert [each.title for each in growth_sections(sources, formats_of(sources, "model"))] == [
        "Speed by context, one request", "Speed by context, 2 requests at a time"
    ]  # fmt: skip


def test_the_name_that_a_server_gives_is_no_second_model(tmp_path: Path) -> None:
    report = report_of(
        tmp_path, a=EVERY["fidelity"], b=EVERY["serving"] | {"model": "served"},
        c=EVERY["serving"] | {"model": "served", "workload": {"dataset": "other"}},
    )  # fmt: skip
    titles = [section.title for section in report.sections]
    assert "A server under load" in titles and "Fidelity" in titles
    assert report.title == "KV cache formats for model" and not report.unused


def test_tuned_on_two_texts(tmp_path: Path) -> None:
    other = EVERY["tune"] | {"text": {"source": "u", "sha256": "cd"}}
    report = report_of(tmp_path, a=EVERY["tune"], b=other)
    (table,) = [table for each in report.sections if each.key == "tuned" for table in each.tables]
    assert [row[1] for row in texts(table)] == ["u", "t"]


def test_sizes_are_those_of_4096_tokens_everywhere(tmp_path: Path) -> None:
    scores = {"piqa": {"bf16": 0.7, K4V4: 0.7}}
    report = report_of(tmp_path, a=tasks(scores), b=fidelity({"f32": 0.0, K4V4: 0.001}))
    shown = render_markdown(report, "")
    assert "6,653" in shown and "6,300" not in shown
    assert all("6,653" in chart.alt for chart in report.charts if chart.name == "divergence")
    assert all("4,096" in chart.alt for chart in report.charts if chart.name == "divergence")


def test_files_of_which_nothing_is_shown_are_named(tmp_path: Path) -> None:
    report = report_of(
        tmp_path,
        old=fidelity({"f32": 0.0, "int8": 0.1}, day="2026-01-01"),
        new=fidelity({"f32": 0.0, "int8": 0.1}, day="2026-01-02"),
        other={"results": []},
    )
    assert [*report.unused.values()] == [("old.json",)] and report.others == ("other.json",)
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


def test_a_data_set_with_other_shots_is_another(tmp_path: Path) -> None:
    """And short prompts are called so: formats with finer groups do not meet their coarse part."""
    for shots, tokens in ((0, 90.0), (20, 1800.0)):
        found = tasks({"arc-easy": {"bf16": 0.5, "int4": 0.4 - shots / 1000}})
        for row in found["results"]:
            row |= {"num_fewshot": shots, "prompt_tokens": tokens}
        write(tmp_path, **{f"shots_{shots}": found})
    text = render_markdown(make_report(read_results([tmp_path])), "command", None)
    assert "arc-easy, 0-shot (" in text and "arc-easy, 20-shot (" in text
    assert "prompts of 1,800 tokens" in text
    assert "Short: prompts of arc-easy, 0-shot have at most 128 tokens" in text
    assert "Left out of the mean." in text and "mean (of 1 data set)" in text
    assert "with short prompts (arc-easy, 0-shot)" in text
