"""Small made-up data sets in the official formats."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

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


def write_data(folder: Path) -> Path:
    """20 questions a data set, two of humaneval; the folder."""
    rng, letters = random.Random(1), "ABCD"
    humaneval: list[dict[str, str]] = []
    for split, count in (("test", 10), ("dev", 5)):
        for subject in ("anatomy", "virology"):
            rows = [[_text(rng, 6), *_choices(rng), rng.choice(letters)] for _ in range(count)]
            _table(folder / f"mmlu/{split}/{subject}_{split}.csv", rows)
    for split, count in (("val", 10), ("dev", 5)):
        for subject in ("law", "logic"):
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


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --data."""
    return write_data(tmp_path_factory.mktemp("data"))
