"""``kvant eval tasks`` as a user runs it."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run, finish, start
from tests.eval.tasks.conftest import data, write_data

__all__ = ["data"]

TASKS = ("--tasks", "arc-easy,lambada,mmlu", "--dtype", "float32", "--kv", "f32,int4")


def _results(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_table_and_its_results(run: Run, tiny: str, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "found.json"
    done = run("eval", "tasks", tiny, "--data", data, *TASKS, "--output", output)
    assert done.code == 0 and "arc-easy  acc_norm  0-shot" in done.out
    found = _results(output)
    assert [(row["kv"], row["task"]) for row in found["results"]] == [
        (kv, task) for kv in ("f32", "int4") for task in ("arc-easy", "lambada", "mmlu")
    ]
    for row in found["results"]:
        assert row["items"] == row["of"] == len(row["outcomes"]) == 20
        assert row["value"] == pytest.approx(row["outcomes"].count("1") / 20)
    shots = {row["task"]: row["num_fewshot"] for row in found["results"]}
    assert shots == {"arc-easy": 0, "lambada": 0, "mmlu": 5}
    assert [pair["kv"] for pair in found["comparisons"]] == ["int4"] * 3
    assert found["baseline"] == "f32" and found["data"] == "local"
    assert not list(tmp_path.glob("*.answers.jsonl"))


def test_json_is_all_of_stdout(run: Run, tiny: str, data: Path) -> None:
    done = run("eval", "tasks", tiny, "--data", data, "--tasks", "lambada", "--kv", "f32", "--json")
    assert json.loads(done.out)["results"][0]["task"] == "lambada" and done.err == ""


def test_a_limit_is_part_of_a_larger_one(run: Run, tiny: str, data: Path) -> None:
    def outcomes(limit: str) -> list[int]:
        words = ("eval", "tasks", tiny, "--data", data, "--tasks", "mmlu,lambada", "--kv", "f32")
        rows = json.loads(run(*words, "--json", "--limit", limit).out)["results"]
        return [row["items"] for row in rows]

    assert outcomes("8") == [8, 8]
    assert outcomes("8,mmlu=3") == outcomes("mmlu=3,8") == [3, 8]
    assert outcomes("mmlu=3") == [3, 20]


def test_a_killed_run_goes_on(run: Run, tiny: str, data: Path, tmp_path: Path) -> None:
    """Killed at any answer, the next run computes what is missing and finds what a run at one go
    finds."""
    output = tmp_path / "found.json"
    words = ("eval", "tasks", tiny, "--data", str(data), *TASKS)
    assert run(*words, "--output", tmp_path / "whole.json").code == 0
    whole = _results(tmp_path / "whole.json")
    answers = tmp_path / "found.json.answers.jsonl"
    process = start(*words, "--output", str(output))
    while not answers.exists() or answers.read_bytes().count(b"\n") < 30:
        assert process.poll() is None or output.exists()
        if output.exists():  # it was faster
            break
    process.kill()
    finish(process)
    kept = answers.read_bytes() if answers.exists() else b""
    assert run(*words, "--output", output).code == 0
    again = _results(output)
    assert kept.count(b"\n") >= 30 or not kept
    assert again["results"] == whole["results"]
    assert again["comparisons"] == whole["comparisons"]
    assert not answers.exists()


def test_ctrl_c_says_how_to_go_on(tiny: str, data: Path, tmp_path: Path) -> None:
    answers = tmp_path / "found.json.answers.jsonl"
    words = (
        "eval",
        "tasks",
        tiny,
        "--data",
        str(data),
        "--tasks",
        "gsm8k",
        "--kv",
        "f32,int8,int4",
    )
    process = start(*words, "--output", str(tmp_path / "found.json"))
    while not answers.exists() or answers.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert "the same command goes on from there" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--tasks", "mmlu,helaswag"), 'no task "helaswag"; did you mean "hellaswag"'),
        (("--tasks", "mmlu,mmlu"), '"mmlu" is named twice'),
        (("--tasks", "mmlu", "--limit", "0"), "limit=0 of mmlu must be at least 1"),
        (("--tasks", "mmlu", "--limit", "x=3"), '--limit "x=3" must be a number'),
        (("--tasks", "mmlu", "--num-fewshot", "-1"), "num_fewshot=-1 must be at least 0"),
        (("--kv", "int8,int8"), "--kv names int8 twice"),
        (("--kv", "auto"), '"auto" depends on the model'),
        (("--tasks", "humaneval"), "add --confirm-run-unsafe-code"),
        (("--tasks", "hellaswag"), "hellaswag"),
        (("--tasks", "passkey", "--lengths", "x"), '--lengths "x" must be whole numbers'),
        (("--tasks", "mmlu", "--num-fewshot", "6"), "there are 5 solved examples"),
        (("--tasks", "arc-easy", "--num-fewshot", "1"), "there are 0 solved examples"),
        (("--output", "no/folder/x.json"), "in a folder that is not there"),
    ],
)
def test_what_is_wrong_is_one_line(
    run: Run, tiny: str, data: Path, words: tuple[str, ...], reason: str
) -> None:
    run("eval", "tasks", tiny, "--data", data, *words).assert_error(2, reason)


def test_a_folder_or_a_file_that_is_not_right(run: Run, tiny: str, tmp_path: Path) -> None:
    words = ("eval", "tasks", tiny, "--kv", "f32", "--tasks", "arc-easy")
    run(*words, "--data", tmp_path / "none").assert_error(2, "is no folder")
    write_data(tmp_path)
    path = tmp_path / "arc/ARC-Easy-Test.jsonl"
    path.write_text(path.read_text()[:-40])
    run(*words, "--data", tmp_path).assert_error(2, "line 20", "ARC-Easy-Test.jsonl")
    path.unlink()
    run(*words, "--data", tmp_path).assert_error(2, "ARC-Easy-Test.jsonl")


def test_without_data_the_hub_is_named(run: Run, tiny: str) -> None:
    """Offline here."""
    done = run("eval", "tasks", tiny, "--tasks", "piqa", "--kv", "f32")
    done.assert_error(2, "piqa cannot be had from the hub", "give a folder with --data")
    run("eval", "tasks", tiny, "--tasks", "needle").assert_error(2, "needle needs local files")


def test_retrieval_by_length(run: Run, tiny: str, data: Path) -> None:
    words = ("--tasks", "passkey", "--lengths", "700,1000", "--limit", "6", "--kv", "f32", "--json")
    (row,) = json.loads(run("eval", "tasks", tiny, "--data", data, *words).out)["results"]
    assert set(row["lengths"]) <= {"700", "1000"} and row["of"] == 20


def test_lm_eval_through_kvant(run: Run) -> None:
    assert "--model kvant" in run("lm-eval", "--help").out
    assert run("lm-eval").code == 2
