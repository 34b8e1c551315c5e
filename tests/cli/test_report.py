"""``kvant report``: what it writes and says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.report.results import EVERY, write

pytest.importorskip("matplotlib", reason="matplotlib is not installed")


def test_page_markdown_and_plots(run: Run, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    write(results, fidelity=EVERY["fidelity"], tasks=EVERY["tasks"], other=[1])
    page, text, plots = tmp_path / "r.html", tmp_path / "a.md", tmp_path / "more" / "plots"
    done = run("report", results, "--output", page, "--markdown", text, "--plots", plots,
               "--title", "What we measured")  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1].startswith("2 results shown, 1 file not shown")
    assert "<h1>What we measured</h1>" in page.read_text()
    assert text.read_text().startswith("# What we measured\n")
    assert {path.suffix for path in plots.iterdir()} == {".png"} and len(list(plots.iterdir())) == 2


def test_the_default_folder_and_page(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run("report").assert_error(2, "no RESULTS", "benchmarks/results")
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    write(folder, fidelity=EVERY["fidelity"])
    assert run("report").code == 0 and (tmp_path / "report.html").is_file()


def test_only_what_is_asked_for(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, fidelity=EVERY["fidelity"])
    assert run("report", "fidelity.json", "--markdown", "a.md").code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"fidelity.json", "a.md"}


def test_errors_are_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    run("report", tmp_path / "bad.json", "--output", tmp_path / "r.html").assert_error(
        2, "bad.json"
    )
    run("report", tmp_path / "gone").assert_error(2, "neither a file nor a folder")
    run("report", "--output", tmp_path).assert_error(2, "--output", "is a folder")
    run("report", "--markdown", tmp_path / "no" / "a.md").assert_error(2, "--markdown")


def test_without_matplotlib(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    write(tmp_path, fidelity=EVERY["fidelity"])
    run("report", tmp_path, "--output", tmp_path / "r.html").assert_error(
        2, "matplotlib", 'pip install "kvant[eval]"'
    )
    assert run("report", tmp_path, "--markdown", tmp_path / "a.md").code == 0


def test_the_table_in_the_documentation_is_what_its_command_writes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs/accuracy.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    kvant (report .*)$", page, flags=re.MULTILINE)
    words = shlex.split(command)
    words[words.index("--markdown") + 1] = str(tmp_path / "accuracy.md")
    monkeypatch.chdir(root)
    assert run(*words).code == 0
    written = (tmp_path / "accuracy.md").read_text(encoding="utf-8")

    before, after = page.split(f"    kvant {command}\n")  # written has pytest's command there
    assert written.startswith(before) and written.endswith(after)
