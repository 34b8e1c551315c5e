from __future__ import annotations

import io
from pathlib import Path

import pytest

from kvant.cli.prompts import read_prompts, title_of
from kvant.errors import RequestError


def write(folder: Path, name: str, data: str | bytes) -> str:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def test_arguments_are_taken_as_they_are() -> None:
    assert read_prompts(["a", "", " b "], None) == ["a", "", " b "]


def test_text_lines(tmp_path: Path) -> None:
    """Only line feeds end a line: a text may hold U+2028 and form feeds."""
    file = write(tmp_path, "p.txt", "\ufeffone\r\n\n  two\u2028half\x0c \n{3}")
    assert read_prompts([], file) == ["one", "  two\u2028half\x0c ", "{3}"]


def test_json_lines(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "c"}]
    file = write(
        tmp_path,
        "p.jsonl",
        '"a\\nb"\n\n{"prompt": "b", "id": 3}\n{"messages": [{"role": "user", "content": "c"}]}\n',
    )
    prompts = read_prompts([], file)
    assert prompts == ["a\nb", "b", messages]
    assert [title_of(prompt) for prompt in prompts] == ["a\nb", "b", "c"]


@pytest.mark.parametrize(
    "line", ("{", "3", "[]x", '{"text": "a"}', '{"messages": "a"}', '{"messages": [1]}', "null")
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    file = write(tmp_path, "p.jsonl", f'"good"\n{line}\n')
    with pytest.raises(RequestError, match=r"p\.jsonl, line 2 is no"):
        read_prompts([], file)


@pytest.mark.parametrize("data", (b"", b"\n \n", b"\xff\xfe"))
def test_files_without_prompts(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(RequestError, match=r"p\.txt"):
        read_prompts([], write(tmp_path, "p.txt", data))


def test_a_missing_file_and_both_sources() -> None:
    with pytest.raises(RequestError, match="cannot read prompts from /no/where"):
        read_prompts([], "/no/where")
    with pytest.raises(RequestError, match="both"):
        read_prompts(["a"], "b")


def test_standard_input_is_one_prompt_or_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert read_prompts([], None) == ["one\ntwo"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert read_prompts([], "-") == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    with pytest.raises(RequestError, match="empty"):
        read_prompts([], None)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    with pytest.raises(RequestError, match="UTF-8"):
        read_prompts([], None)


def test_a_terminal_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held down: a command that waits for ever because it was given no prompt."""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    with pytest.raises(RequestError, match="no prompt"):
        read_prompts([], None)
