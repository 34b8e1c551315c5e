"""What is hidden is there once, at its depth, in a prompt that fills its length."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvant.errors import ConfigError
from kvant.eval.tasks.files import Rows
from kvant.eval.tasks.retrieval import (
    NEEDLE_TOKENS,
    PASSKEY_TOKENS,
    needle_found,
    needle_rows,
    passkey_found,
    passkey_rows,
)
from kvant.loading.tokenizer import Tokenizer

NEEDLE = re.compile(r"The best thing to do in San Francisco is eat a sandwich[^\n]*\n")
ESSAYS = "\n\n".join(
    " ".join(f"Sentence {i} of essay {essay} says {'so ' * (i % 7)}much." for i in range(50))
    for essay in "abcd"
)


def words_and_marks(text: str) -> int:
    """Stands in for a tokenizer: words of up to 5 letters, and marks."""
    return len(re.findall(r"\w{1,5}|[^\w\s]", text))


def in_bytes(text: str) -> int:
    return len(text.encode())


COUNTS = (words_and_marks, in_bytes)
MAKERS: dict[str, Callable[[Callable[[str], int], list[int], int], Rows]] = {
    "passkey": passkey_rows,
    "needle": lambda count, lengths, depths: needle_rows(ESSAYS, count, lengths, depths),
}
RESERVED = {"passkey": PASSKEY_TOKENS, "needle": NEEDLE_TOKENS}


def _hidden(task: str, row: dict[str, Any]) -> re.Pattern[str]:
    if task == "needle":
        return NEEDLE
    return re.compile(rf"The pass key is {row['target']}\. [^\n]*\n")


@pytest.mark.parametrize("task", MAKERS)
@given(
    count=st.sampled_from(COUNTS),
    length=st.integers(500, 40_000),
    depths=st.integers(1, 9),
)
def test_prompts_fill_their_length(
    task: str, count: Callable[[str], int], length: int, depths: int
) -> None:
    """Less than a long word is left: 12 bytes."""
    for row in MAKERS[task](count, [length], depths):
        assert row["length"] == length
        assert 0 <= length - RESERVED[task] - count(row["prompt"]) <= 12


@pytest.mark.parametrize("task", MAKERS)
@given(length=st.integers(150, 20_000), depths=st.integers(2, 9))
def test_it_is_there_once_at_its_depth(task: str, length: int, depths: int) -> None:
    rows = MAKERS[task](words_and_marks, [length], depths)
    assert len(rows) == depths
    for row in rows:
        (found,) = _hidden(task, row).finditer(row["prompt"])
        before = row["prompt"][: found.start()].removesuffix("\n")
        hay = row["prompt"][found.end() :]
        if task == "passkey":
            before = before.partition("quiz you about the important information there.\n")[2]
            hay = hay.rpartition("What is the pass key?")[0]
            assert row["prompt"].count(row["target"]) == 2
        else:
            hay = hay.rpartition("Question: ")[0]
        whole = len(before) + len(hay)
        exact = whole * row["depth_percent"] / 100
        longest = 60  # characters of a sentence
        assert exact - longest <= len(before) <= exact + 4
        assert not before or row["depth_percent"] == 100 or before.endswith(".")


@pytest.mark.parametrize("task", MAKERS)
def test_rows_are_by_length_then_depth(task: str) -> None:
    rows = MAKERS[task](words_and_marks, [700, 300], 3)
    found = [(row["length"], row["depth_percent"]) for row in rows]
    assert found == [(n, depth) for n in (700, 300) for depth in (0.0, 50.0, 100.0)]
    assert [row["depth_percent"] for row in MAKERS[task](words_and_marks, [300], 1)] == [50.0]


@pytest.mark.parametrize("task", MAKERS)
def test_the_same_each_time(task: str) -> None:
    rows = MAKERS[task](words_and_marks, [300, 900], 5)
    assert rows == MAKERS[task](words_and_marks, [300, 900], 5)
    assert rows[5:] == MAKERS[task](words_and_marks, [900], 5), "whatever else is asked for"


def test_numbers_differ() -> None:
    rows = passkey_rows(words_and_marks, range(200, 300, 10), 10)
    keys = [row["target"] for row in rows]
    assert len(set(keys)) > 95 and all(re.fullmatch(r"[1-9]\d{4}", key) for key in keys)


def test_essays_are_repeated_where_they_are_too_few() -> None:
    (row,) = needle_rows("One day. Another one.", words_and_marks, [2000], 1)
    assert row["prompt"].count("One day. Another one.") > 200
    assert len(NEEDLE.findall(row["prompt"])) == 1


@pytest.mark.parametrize("task", MAKERS)
@pytest.mark.parametrize("length", [1000, 100_000])
def test_few_prompts_are_counted(task: str, length: int) -> None:
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(words_and_marks(text))
        return counted[-1]

    MAKERS[task](count, [length], 4)
    assert len(counted) <= 4 * 10 and max(counted) < 2 * length


def test_a_text_without_spaces_does_not_explode() -> None:
    text = "一个很长的句子没有空格。" * 50
    for row in needle_rows(f"{text} {text}", len, [3000], 3):
        assert len(row["prompt"]) <= 3000 - NEEDLE_TOKENS


def test_tokens_of_the_model_count(tiny: str) -> None:
    """With those that stand around every prompt."""
    tokenizer = Tokenizer.from_folder(Path(tiny))
    tokenizer.lead = (256, 256, 256)
    (row,) = passkey_rows(lambda text: len(tokenizer.encode(text)), [2000], 1, reserve=9)
    assert 1980 <= len(tokenizer.encode(row["prompt"])) <= 1991


@pytest.mark.parametrize("task", MAKERS)
def test_lengths_that_are_too_short(task: str) -> None:
    with pytest.raises(ConfigError, match=rf"20 tokens is too short for the task {task}") as caught:
        MAKERS[task](words_and_marks, [400, 20], 2)
    found = re.search(r"take (\d+); give a longer one", str(caught.value))
    assert found is not None
    shortest = int(found[1])
    assert len(MAKERS[task](words_and_marks, [shortest], 2)) == 2
    with pytest.raises(ConfigError, match="too short"):
        MAKERS[task](words_and_marks, [shortest - 1], 2)


@pytest.mark.parametrize("task", MAKERS)
def test_values_out_of_range(task: str) -> None:
    with pytest.raises(ConfigError, match="lengths=500,0: expected numbers from 1"):
        MAKERS[task](words_and_marks, [500, 0], 2)
    with pytest.raises(ConfigError, match="lengths=: expected"):
        MAKERS[task](words_and_marks, [], 2)
    with pytest.raises(ConfigError, match="depths=0: expected"):
        MAKERS[task](words_and_marks, [500], 0)
    with pytest.raises(ConfigError, match="reserve=-1: expected"):
        passkey_rows(words_and_marks, [500], 1, reserve=-1)
    with pytest.raises(ConfigError, match="no words"):
        needle_rows(" \n", words_and_marks, [500], 1)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" 12345.\nThe pass key", True),
        ("is 12345", True),
        ("**12345**", True),
        ("123456", False),
        ("912345", False),
        ("12 345", False),
        ("", False),
    ],
)
def test_an_answer_has_the_number(answer: str, found: bool) -> None:
    assert passkey_found(answer, "12345") is found


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" to eat a sandwich and sit in Dolores Park on a sunny day.", True),
        ("Sit in dolores\npark with a SANDWICH", True),
        ("eat a sandwich", False),
        ("visit Dolores Park", False),
        ("visit the Golden Gate Bridge", False),
        ("", False),
    ],
)
def test_an_answer_names_the_facts(answer: str, found: bool) -> None:
    (row,) = needle_rows(ESSAYS, words_and_marks, [300], 1)
    assert needle_found(answer, row) is found
