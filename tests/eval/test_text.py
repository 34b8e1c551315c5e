from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from kvant.errors import RequestError
from kvant.eval.text import Text, cut_windows, default_text, read_text
from kvant.loading.tokenizer import Tokenizer

ASCII = Text("made here", "".join(chr(32 + i % 90) for i in range(1000)))


@pytest.fixture
def tokenizer(tiny: str) -> Tokenizer:
    return Tokenizer.from_folder(Path(tiny))


def test_windows_are_consecutive(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ASCII.content, add_special=False)
    assert cut_windows(ASCII, tokenizer, 100, 3) == [ids[0:100], ids[100:200], ids[200:300]]


def test_each_window_begins_as_the_model_wants_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ASCII.content, add_special=False)
    tokenizer.lead, tokenizer.trail = (256,), (257,)
    found = cut_windows(ASCII, tokenizer, 100, 20)
    assert found == [[256, *ids[99 * i : 99 * i + 99]] for i in range(10)]


def test_as_many_windows_as_there_are(tokenizer: Tokenizer) -> None:
    assert len(cut_windows(ASCII, tokenizer, 100, 50)) == 10
    assert len(cut_windows(ASCII, tokenizer, 334, 50)) == 2
    assert len(cut_windows(ASCII, tokenizer, 1000, 2)) == 1
    with pytest.raises(RequestError, match=r"made here has 1000 tokens.*ctx=1001 takes 1001"):
        cut_windows(ASCII, tokenizer, 1001, 1)


def test_no_more_is_tokenized_than_needed(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    encode = tokenizer.encode

    def counting(text: str, *, add_special: bool = True) -> list[int]:
        read.append(len(text))
        return encode(text, add_special=add_special)

    monkeypatch.setattr(tokenizer, "encode", counting)
    book = Text("book", ASCII.content * 100)
    found = cut_windows(book, tokenizer, 100, 2)
    assert sum(read) < 4000 and len(book.content) == 100_000
    # A long word is one token: more characters are needed than a token usually has.
    monkeypatch.setattr(tokenizer, "encode", lambda text, **_: list(range(len(text) // 50)))
    assert cut_windows(book, tokenizer, 100, 2) == [list(range(100)), list(range(100, 200))]
    assert all(len(ids) == 100 for ids in found)


def test_the_default_is_prose() -> None:
    text = default_text()
    assert len(text.content) > 300_000 and "pydoc" in text.source
    assert text.content.count(" the ") > 3000
    assert text == default_text()


def test_files(tmp_path: Path) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes("\ufeffWörter\n".encode())
    packed.write_bytes(gzip.compress("Wörter\n".encode()))
    assert read_text(plain).content == read_text(packed).content == "Wörter\n"
    first, second = read_text(plain).describe(), read_text(packed).describe()
    assert first.pop("source") == str(plain) and second.pop("source") == str(packed)
    assert first == second and first["characters"] == 7


@pytest.mark.parametrize(
    ("name", "data"),
    (
        ("a.bin", b"\xff\xfe\x00\x01"),
        ("a.bin", b"text with a \x00 in it"),
        ("a.gz", b"no gzip"),
        ("a.gz", gzip.compress(b"cut" * 1000, mtime=0)[:-9]),
        ("a.gz", gzip.compress(b"damaged" * 1000, mtime=0)[:15] + b"\xff" * 30),
        ("a.gz", gzip.compress(b"\xff\xff", mtime=0)),
    ),
)
def test_files_that_are_no_text(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RequestError, match=f"cannot read the text .*{name}"):
        read_text(tmp_path / name)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RequestError, match="cannot read the text"):
            read_text(path)
