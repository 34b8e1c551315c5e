"""The documents: self-contained, escaped, with the figures and their commands in them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from kvant.errors import RequestError
from kvant.report import Report, make_report, read_results, render_markdown, render_page
from kvant.report.drawing import save_chart, svg_of
from kvant.report.fidelity import fidelity_groups, kld_chart
from kvant.report.names import formats_of, label_of
from tests.report.results import EVERY, K4V4, fidelity, machine, tasks, write

pytest.importorskip("matplotlib", reason="matplotlib is not installed")

COMMAND = "kvant report results"
HOSTILE = '<script>alert("1")</script>'


def report_of(folder: Path, **results: Any) -> Report:
    return make_report(read_results([write(folder, **results)]))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report_of(tmp_path_factory.mktemp("results"), **EVERY)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return render_page(report, COMMAND)


def test_a_page_is_one_file_with_every_section_and_command(report: Report, page: str) -> None:
    assert not re.search(r'(?:src|href)="(?!#|data:)', page) and "url(http" not in page
    assert "@import" not in page and "<script" not in page
    for section in report.sections:
        assert f'id="{section.key}"' in page
    for source in report.shown:
        assert source.name in page and source.stored.command in page
    assert COMMAND in page and "k4v4" in page


def test_ids_are_there_once(page: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(set(ids)) == len(ids)


def test_the_same_results_make_the_same_page(report: Report, page: str) -> None:
    assert render_page(report, COMMAND) == page


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    found = tasks({HOSTILE: {"bf16": 0.7, "int8": 0.6}, "a|b": {"bf16": 0.7, "int8": 0.6}})
    for row in (*found["results"], *found["comparisons"]):
        if row["kv_spec"] == "int8":
            row["kv_spec"] = HOSTILE
    lying = fidelity({"f32": 0.0, "int8": 0.1}, command=HOSTILE, model=HOSTILE)
    lying["results"][1]["kv_spec"] = "$<b>x"
    report = report_of(
        tmp_path, tasks=found | {"model": HOSTILE, "machine": machine() | {"cpu": HOSTILE}},
        fidelity=lying,
    )  # fmt: skip
    page = render_page(report, HOSTILE)
    assert "<script" not in page and "<b>x" not in page and "&lt;script&gt;" in page
    text = render_markdown(report, HOSTILE)
    outside = re.sub(r"(?m)^ {4,}.*$|`[^`]*`", "", text)
    assert "a\\|b" in text and not re.search(r"(?<!\\)<", outside)


def test_charts_are_drawn_as_svg_in_the_colours_of_the_page(report: Report) -> None:
    for chart in report.charts:
        for narrow in (False, True) if chart.narrow else (False,):
            svg = svg_of(chart, narrow=narrow)
            root = ET.fromstring(svg)
            assert root.tag.endswith("svg") and root.get("aria-hidden") == "true"
            assert len(list(root.iter("text"))) > 3
            assert not re.search("#[0-9a-f]{6}", svg)
        assert chart.alt and chart.title


def test_names_that_look_like_colours_and_ids_stay_as_they_are(tmp_path: Path) -> None:
    klds = fidelity({"f32": 0.0, "int8": 0.1, "int4": 0.2})
    names = ["#1a1e24", ' id="a" url(#b)']
    for row, name in zip(klds["results"][1:], names, strict=True):
        row["kv_spec"] = name
    (chart,) = report_of(tmp_path, a=klds).charts
    root = ET.fromstring(svg_of(chart))
    texts = [text.text for text in root.iter() if text.tag.endswith("text")]
    assert {*names} <= {*texts}


def test_pictures_do_not_depend_on_settings_of_the_user(report: Report) -> None:
    import matplotlib as mpl

    with mpl.rc_context({"text.usetex": True, "font.size": 30, "axes.grid": True}):
        assert svg_of(report.charts[0]) == svg_of(report.charts[0])
        drawn = svg_of(report.charts[0])
    assert drawn == svg_of(report.charts[0])


def damaged(kind: str, row: int, **values: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(EVERY[kind]))
    found["results"][row] |= values
    return {kind: found}


@pytest.mark.parametrize(
    "results",
    (
        damaged("throughput", 0, request_throughput=0.0),
        damaged("throughput", 1, request_throughput=0.0),
        damaged("latency", 0, output_throughput=0.0, median_ttft_ms=0.0),
        damaged("linear", 0, seconds=0.0),
        damaged("tasks", 0, items_sha256="other"),
        damaged("tasks", 0, metric="other"),
        damaged("tasks", 0, num_fewshot=None),
        damaged("tasks", 0, items=1),
        damaged("tasks", 0, kv_spec="int8"),
        damaged("fidelity", 0, ctx=3),
        {"tasks": EVERY["tasks"] | {"baseline": "gone"}},
        {"tasks": EVERY["tasks"] | {"comparisons": []}},
        {"fidelity": EVERY["fidelity"] | {"baseline": "gone"}},
    ),
)
def test_damaged_results_make_a_page(tmp_path: Path, results: dict[str, Any]) -> None:
    report = report_of(tmp_path, **results)
    assert "<h1>" in render_page(report, COMMAND) and render_markdown(report, COMMAND)


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    (
        ("tasks", "items", 10**400),
        ("tasks", "of", "9" * 400),
        ("tasks", "bits_per_element", 1e-300),
        ("tasks", "lengths", {"9" * 400: 0.5}),
        ("latency", "prompt_tokens", 10**400),
        ("throughput", "kv_tokens", 10**400),
        ("fidelity", "kld", 1e300),
        ("serving", "completed", -(10**400)),
    ),
)
def test_absurd_numbers_are_named(tmp_path: Path, kind: str, key: str, value: object) -> None:
    with pytest.raises(RequestError, match=rf'"results\.0\.{key}.*" is wrong') as caught:
        report_of(tmp_path, **damaged(kind, 0, **{key: value}))
    assert len(str(caught.value)) < 400


def test_charts_are_written_as_png(report: Report, tmp_path: Path) -> None:
    save_chart(report.charts[0], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_names_of_formats_do_not_overlap(tmp_path: Path) -> None:
    from matplotlib.text import Text

    from kvant.figure import new_figure

    klds = {"f32": 0.0, "int8": 0.0003, "int4": 0.0052, K4V4: 0.005}
    sources = read_results([write(tmp_path, a=fidelity(klds))]).sources
    (group,) = fidelity_groups(sources, formats_of(sources, "model"))
    chart = kld_chart(group, 0.0075)
    assert chart is not None
    figure = new_figure(4.7, 4.6)
    chart.draw(figure)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = {text.get_text(): Text.get_window_extent(text) for text in axes.texts}
    assert {label_of(spec) for spec in klds if spec != "f32"} <= set(boxes)
    names = list(boxes.values())
    assert all(not a.overlaps(b) for i, a in enumerate(names) for b in names[:i])


def test_nothing_to_draw(tmp_path: Path) -> None:
    report = report_of(tmp_path, a=fidelity({"f32": 0.0}))
    assert report.charts == [] and report.verdicts == ()
    assert "<h1>" in render_page(report, COMMAND)


def test_markdown_begins_with_accuracy_and_names_its_commands(report: Report) -> None:
    text = render_markdown(report, COMMAND)
    headings = re.findall(r"(?m)^## (.*)$", text)
    assert headings[:2] == ["Which format to take", "Accuracy on data sets"]
    assert "Throughput of a data set" not in headings
    assert f"    {COMMAND}\n" in text and "kvant eval tasks model --tasks ..." in text
    assert "| data set | items | bf16 | int8 | int4 | k4v4 |" in text
    assert "| piqa (acc, 5-shot, guessing 25 %) | 400 (of 1,200) | 68.00 ±1.00 |" in text
    for block in re.findall(r"(?m)(?:^\|.*\n)+", text):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
