"""Answers that outlive the process: none lost, none counted twice, none of another run."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvant.errors import RequestError
from kvant.eval.tasks.journal import Journal, digest

IDENTITY = {"model": "m", "dtype": "bfloat16"}


def _fill(path: Path, count: int) -> None:
    with Journal(path, IDENTITY) as journal:
        for number in range(count):
            journal.add(digest(number), [-float(number), True])


def test_answers_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _fill(path, 5)
    with Journal(path, IDENTITY) as journal:
        assert journal.found == 5 and journal.get(digest(3)) == [-3.0, True]
        assert journal.get(digest(5)) is None
        journal.add(digest(5), 'a text\nwith "quotes" and \ud800')
    with Journal(path, IDENTITY) as journal:
        assert journal.get(digest(5)) == 'a text\nwith "quotes" and \ud800'


def test_a_cut_line_is_forgotten_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _fill(path, 3)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        with Journal(path, IDENTITY) as journal:
            assert journal.found == 2
            journal.add(digest(2), [-2.0, True])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"{}\n",
        b'{"key": "k"}\n',
        b"\n",
        b"[1]\n",
        b'{"key": [1], "answer": "a"}\n',
        b'{"key": "k", "answer": null}\n',
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    _fill(path, 2)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1], f"{line}\n".encode(), lines[2]]))
    with pytest.raises(RequestError, match=r"line 3 of .*a\.jsonl is damaged; delete"):
        Journal(path, IDENTITY)


def test_answers_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _fill(path, 2)
    with pytest.raises(RequestError, match=r"another run .dtype 'bfloat16', now 'float32'"):
        Journal(path, IDENTITY | {"dtype": "float32"})
    with Journal(path, IDENTITY) as journal:
        assert journal.found == 2


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with (
        Journal(path, IDENTITY),
        pytest.raises(RequestError, match="in use by another evaluation"),
    ):
        Journal(path, IDENTITY)
    Journal(path, IDENTITY).close()


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot keep answers in"):
        Journal(tmp_path / "no folder" / "a.jsonl", IDENTITY)


def test_a_finished_run_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Journal(path, IDENTITY) as journal:
        journal.add("k", "text")
        journal.remove()
    assert not path.exists()


def test_without_a_file_answers_are_kept_in_memory() -> None:
    journal = Journal(None, IDENTITY)
    journal.add("k", "text")
    assert journal.get("k") == "text"
