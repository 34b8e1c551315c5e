"""Machines that permit no sandbox; these tests need none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvant.errors import ConfigError
from kvant.eval.tasks import sandbox
from kvant.eval.tasks.sandbox import check_sandbox, run_program, run_programs


def test_a_machine_that_permits_none_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    jail = tmp_path / "jail.py"
    jail.write_text('print(\'{"error": "namespaces: Operation not permitted"}\')')
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    for attempt in (check_sandbox, lambda: run_program(""), lambda: run_programs(["", ""])):
        with pytest.raises(ConfigError, match=r"\(namespaces: Operation not permitted\); run on"):
            attempt()


def test_a_sandbox_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    jail = tmp_path / "jail.py"
    jail.write_text("import not_there")
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    with pytest.raises(ConfigError, match="No module named 'not_there'"):
        run_program("")


def test_only_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="this is darwin"):
        check_sandbox()
