"""``kvant eval tasks`` as a user runs it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

import kvant.engine.load
from kvant.report.markdown import render_markdown
from kvant.report.report import make_report
from kvant.report.stored import read_results
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
        count = 57 if row["task"] == "mmlu" else 20
        assert row["items"] == row["of"] == len(row["outcomes"]) == count
        assert row["value"] == pytest.approx(row["outcomes"].count("1") / count, rel=1e-5)
    report = make_report(read_results([output]), None)
    assert "arc-easy" in render_markdown(report, "kvant report", None)
    shots = {row["task"]: row["num_fewshot"] for row in found["results"]}
    assert shots == {"arc-easy": 0, "lambada": 0, "mmlu": 5}
    assert [pair["kv"] for pair in found["comparisons"]] == ["int4"] * 3
    assert found["baseline"] == "f32" and found["data"] == "local"
    assert not list(tmp_path.glob("*.answers.jsonl"))


def test_every_key_is_documented(run: Run, tiny: str, data: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    section = page.split("### Keys of the results")[1].split("\n## ")[0]
    documented = set(re.findall(r"`(\w+)`", section)) - {"comparisons", "limit", "session_len"}
    words = ("--tasks", "lambada", "--kv", "f32,int8", "--json")
    found = json.loads(run("eval", "tasks", tiny, "--data", data, *words).out)
    assert documented == set(found["results"][0]) | set(found["comparisons"][0])


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
    found = json.loads(
        run(
            "eval", "tasks", tiny, "--data", data, "--tasks", "mmlu,lambada", "--kv", "f32",
            "--json", "--limit", "8,mmlu=3",
        ).out
    )  # fmt: skip
    assert found["limit"] == {"mmlu": 3, "lambada": 8} and found["session_len"] == 16384


def _wait_for_answers(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if path.exists() and path.read_bytes().count(b"\n") > count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail(f"{path} has not got {count} answers")


def test_a_killed_run_goes_on(run: Run, tiny: str, data: Path, tmp_path: Path) -> None:
    """With what a run at one go finds; and what the killed run answered is not asked again: an
    answer that is forged meanwhile is believed."""
    words = ("eval", "tasks", tiny, "--data", str(data), *TASKS)
    output, answers = tmp_path / "found.json", tmp_path / "found.json.answers.jsonl"
    process = start(*words, "--tasks", "arc-easy,mmlu,gsm8k", "--output", str(output))
    _wait_for_answers(answers, 30, process)
    process.kill()
    finish(process)
    kept = answers.read_text()
    assert run(*words, "--output", output).code == 0 and not answers.exists()
    again = _results(output)["results"]
    assert run(*words, "--output", output).code == 0
    assert _results(output)["results"] == again
    forged = [json.loads(line) for line in kept.splitlines(keepends=True) if line.endswith("\n")]
    for entry in forged[1:]:
        entry["answer"] = [entry["answer"][0] - 1000, False]
    answers.write_text("".join(json.dumps(entry) + "\n" for entry in forged))
    assert run(*words, "--output", output).code == 0
    believed = _results(output)["results"]
    assert [row["items"] for row in believed] == [row["items"] for row in again]
    assert believed[0]["outcomes"] != again[0]["outcomes"]


def test_ctrl_c_says_how_to_go_on(tiny: str, data: Path, tmp_path: Path) -> None:
    words = ("eval", "tasks", tiny, "--data", str(data), "--tasks", "arc-easy,gsm8k")
    process = start(*words, "--output", str(tmp_path / "found.json"))
    _wait_for_answers(tmp_path / "found.json.answers.jsonl", 2, process)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert done.code == 130
    assert "the same command goes on from there" in done.err and done.err.count("\n") == 1


def test_one_engine_is_alive_at_a_time(run: Run, tiny: str, data: Path) -> None:
    """Else the second format had to do with what the first one left of the memory."""
    alive: list[weakref.ref[Any]] = []
    start_model = kvant.engine.load.start_model

    def watched(*args: Any) -> Any:
        assert all(each() is None for each in alive)
        model = start_model(*args)
        alive.append(weakref.ref(model.engine.memory))
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvant.engine.load.start_model", watched)
        words = ("--tasks", "lambada", "--kv", "f32,int8,int4", "--limit", "3")
        assert run("eval", "tasks", tiny, "--data", data, *words).code == 0
    assert len(alive) == 3


def test_prompts_that_are_cut_are_cut_alike(run: Run, tiny: str, data: Path) -> None:
    """A pool that holds less than a sequence is refused, not made up for by shorter prompts."""
    words = ("--tasks", "lambada", "--kv", "f32,int4", "--session-len", "512")
    run("eval", "tasks", tiny, "--data", data, *words, "--kv-tokens", "256").assert_error(
        2, "session_len=512 does not fit"
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--tasks", "mmlu,helaswag"), 'no task "helaswag"; did you mean "hellaswag"'),
        (("--tasks", "mmlu,mmlu"), '"mmlu" is named twice'),
        (("--tasks", "mmlu", "--limit", "0"), "limit=0 of mmlu must be at least 1"),
        (("--tasks", "mmlu", "--limit", "x=3"), '--limit "x=3" must be a number'),
        (("--tasks", "mmlu", "--limit", "4,5"), '--limit "4,5" must be a number'),
        (("--tasks", "passkey", "--lengths", "99999"), "longest sequence of 16384 tokens"),
        (("--tasks", "passkey", "--num-fewshot", "1"), "there are 0 solved examples"),
        (("--tasks", "mmlu", "--num-fewshot", "-1"), "num_fewshot=-1 must be at least 0"),
        (("--kv", "int8,int8"), "--kv names int8 twice"),
        (("--kv", "auto"), '"auto" depends on the model'),
        (("--tasks", "humaneval"), "add --confirm-run-unsafe-code"),
        (("--tasks", "hellaswag"), "hellaswag"),
        (("--tasks", "passkey", "--lengths", "x"), '--lengths "x" must be whole numbers'),
        (("--tasks", "mmlu", "--num-fewshot", "6"), "there are 5 solved examples"),
        (("--tasks", "arc-easy", "--num-fewshot", "20"), "leaves no question of 20"),
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


def test_lm_eval_through_kvant(run: Run, tiny: str, tmp_path: Path) -> None:
    """The command line of lm-eval itself, with a task file of the user's."""
    assert "--model kvant" in run("lm-eval", "--help").out
    assert run("lm-eval").code == 2
    rows = [{"question": f"number {n}", "right": n % 2} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(
        f"""
task: made_up
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: right
doc_to_choice: ["yes", "no"]
"""
    )
    process = start(
        "lm-eval", "--model", "kvant", "--model_args", f"pretrained={tiny},kv=int4h,dtype=float32",
        "--tasks", str(tmp_path / "task.yaml"), "--output_path", str(tmp_path / "out"),
    )  # fmt: skip
    done = finish(process, timeout=300)
    assert done.code == 0, done.err
    (found,) = (tmp_path / "out").rglob("results_*.json")
    stored = json.loads(found.read_text())
    assert stored["n-samples"]["made_up"]["effective"] == 8
    assert 0 <= stored["results"]["made_up"]["acc,none"] <= 1
    assert stored["config"]["batch_size"] == "auto"
