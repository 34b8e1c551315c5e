"""Small made-up data sets in the official formats."""

from __future__ import annotations

import csv
import json
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest

from kvant.eval.tasks.catalogue import BENCHMARKS

_WORDS = ("the", "a", "red", "old", "cat", "dog", "house", "runs", "sees", "likes", "under", "not")


def _text(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(_WORDS, k=count))


def _lines(path: Path, rows: Iterable[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _table(path: Path, rows: Iterable[Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def _choices(rng: random.Random) -> list[str]:
    return [_text(rng, rng.randint(1, 4)) for _ in range(4)]


@cache
def subjects(name: str) -> list[str]:
    """Of mmlu or ceval, as lm-eval has them."""
    bench = BENCHMARKS[name]
    folder = Path(lm_eval.tasks.__file__).parent / str(bench.folder)
    manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(folder))
    before = bench.task.partition("{}")[0]
    return [x.removeprefix(before) for x in manager.all_subtasks if x.startswith(before)]


def write_data(folder: Path) -> Path:
    """20 questions a data set, one a subject, two of humaneval; the folder."""
    rng, letters = random.Random(1), "ABCD"
    humaneval: list[dict[str, str]] = []
    for split, count in (("test", 1), ("dev", 5)):
        for subject in subjects("mmlu"):
            rows = [[_text(rng, 6), *_choices(rng), rng.choice(letters)] for _ in range(count)]
            _table(folder / f"mmlu/{split}/{subject}_{split}.csv", rows)
    for split, count in (("val", 1), ("dev", 5)):
        for subject in subjects("ceval"):
            head = ["id", "question", *letters, "answer", *["explanation"] * (split == "dev")]
            tail = [""] * (split == "dev")
            rows = [
                [i, _text(rng, 6), *_choices(rng), rng.choice(letters), *tail] for i in range(count)
            ]
            _table(folder / f"ceval/{split}/{subject}_{split}.csv", [head, *rows])
    arc: list[dict[str, Any]] = []
    for number in range(20):
        choices = [
            {"text": text, "label": label}
            for label, text in zip(letters, _choices(rng), strict=True)
        ]
        question = {"stem": _text(rng, 5), "choices": choices}
        arc.append({"id": str(number), "question": question, "answerKey": rng.choice(letters)})
    _lines(folder / "arc/ARC-Easy-Test.jsonl", arc)
    _lines(folder / "lambada/lambada_test.jsonl", [{"text": _text(rng, 12)} for _ in range(20)])
    for split, count in (("test", 20), ("train", 8)):
        numbers = [rng.randint(2, 99) for _ in range(count)]
        rows = [{"question": _text(rng, 8), "answer": f"So.\n#### {n}"} for n in numbers]
        _lines(folder / f"gsm8k/{split}.jsonl", rows)
    for name, verdict in (("one", "1"), ("two", "2")):
        humaneval.append(
            {
                "task_id": f"Made/{name}",
                "prompt": f"def {name}():\n",
                "entry_point": name,
                "canonical_solution": f"    return {verdict}\n",
                "test": f"def check(candidate):\n    assert candidate() == {verdict}\n",
            }
        )
    _lines(folder / "humaneval/HumanEval.jsonl", humaneval)
    return folder


def refusal(*through: str) -> str:
    """Why the system gives a program started through ``through`` none of the namespaces and mounts
    that a sandbox is made of; empty: it gives them, or nobody knows.

    util-linux asks it, not the sandbox: a fault of the sandbox is to fail its tests.
    """
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
        return f"sandboxes are for Linux on x86-64 and arm64, this is {platform.platform()}"
    if shutil.which("unshare") is None:
        return ""
    kinds = ("--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork")
    for user in ((), ("--user", "--map-root-user")):
        probe = ("mount", "-n", "-t", "tmpfs", "none", "/dev")
        command = [*through, "unshare", *user, *kinds, *probe]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode == 0:
            return ""
    return f"this machine permits no sandbox ({done.stderr.strip()})"


@pytest.fixture(scope="session")
def permitted() -> None:
    """Skips where the system permits no sandbox."""
    if reason := refusal():
        pytest.skip(reason)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --data."""
    return write_data(tmp_path_factory.mktemp("data"))
